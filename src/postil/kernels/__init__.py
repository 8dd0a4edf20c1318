"""The ops that everything is made of, each with its plain torch reference beside it."""
