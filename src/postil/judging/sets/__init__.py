"""What is judged on: held-out rows of the target, prose, chat, choices and pairs, read and made into samples."""
