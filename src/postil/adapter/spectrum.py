"""The spectrum of what training changed: singular values and effective ranks of ΔW per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float

from postil.adapter.adapter import Adapter
from postil.adapter.targets import kind_of
from postil.base import Base, Nf4Linear, fetch
from postil.base.catalog import names as known_bases
from postil.base.stored import StoredTensor, nf4_weights, read_config, read_tensor, stored_tensors
from postil.errors import AdapterError, BaseModelError, listed, nearest

FLOATS = ("F32", "BF16", "F16")
HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight", "embed_in.weight")
CONV1D_MODELS, CONV1D = ("gpt2", "openai-gpt"), ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored turned
TOP, SIMILARITY = 10, 0.5  # of intruder dimensions: singular vectors looked at, and the cosine that is none


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One module's ΔW [d_out, d_in]. values: float64 [k], its singular values, falling, k at most min(d_out, d_in).

    base_norm: the Frobenius norm of the base's weight there, None where no base was given. intruders: how many of
    the adapted weight's first ten left singular vectors lie near none of the base's (see `intruders_of`).
    """

    path: str
    d_out: int
    d_in: int
    values: Float[torch.Tensor, " k"]
    base_norm: float | None = None
    intruders: int | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of ΔW: sqrt(Σ σ²)."""
        return float(self.values.square().sum().sqrt())

    @property
    def largest(self) -> float:
        """The spectral norm: the largest singular value."""
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def entropy_rank(self) -> float:
        """exp(-Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007, "The effective rank", definition 2); 0 for ΔW = 0."""
        share = self.values[self.values > 0] / self.values.sum()
        return math.exp(-float((share * share.log()).sum())) if len(share) else 0.0

    @property
    def participation_rank(self) -> float:
        """(Σ σ²)² / Σ σ⁴, the participation ratio of the energies (Gao et al. 2017, "A theory of multineuronal
        dimensionality, dynamics and measurement"); 0 for ΔW = 0."""
        energy = self._energy()
        return float(1.0 / energy.square().sum()) if len(energy) else 0.0

    def energy_rank(self, share: float = 0.99) -> int:
        """The fewest singular values that hold `share` of the energy Σ σ²; 0 for ΔW = 0."""
        return rank_for(self.values, share)

    def _energy(self) -> torch.Tensor:
        """σ² over their sum, scaled first so that neither over- nor underflows."""
        if not self.largest:
            return self.values[:0]
        energy = (self.values / self.largest).square()
        return energy / energy.sum()


@dataclass(frozen=True, slots=True)
class Delta:
    """ΔW = B·A·scale of one module, in float64: a [rank, d_in], b [d_out, rank]; of an embedding d_in is its
    vocabulary."""

    path: str
    a: Float[torch.Tensor, "rank d_in"]
    b: Float[torch.Tensor, "d_out rank"]
    scale: float
    embedding: bool = False


def rank_for(values: Float[torch.Tensor, " k"], share: float) -> int:
    """The fewest of the falling singular values `values` that hold `share` of Σ σ²; 0 where all are zero."""
    top = float(values[0]) if len(values) else 0.0
    if top == 0.0:
        return 0
    energy = (values / top).square()
    held = energy.cumsum(0)
    wanted = share * float(held[-1]) * (1 - 1e-12)  # a share of 1 is reached, whatever the order of the sum
    return min(int(torch.searchsorted(held, wanted)) + 1, len(values))


def deltas(adapter: Adapter) -> Iterator[Delta]:
    """Every adapted module's ΔW as its factors, in the adapter's order."""
    for path in adapter.modules:
        embedding = f"{path}.lora_embedding_A" in adapter.tensors
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (adapter.tensors[f"{path}.{end}"].double() for end in ends)
        yield Delta(path, a, b, adapter.config.scale_of(path), embedding)


def svd_of(
    delta: Delta,
) -> tuple[Float[torch.Tensor, "d_out k"], Float[torch.Tensor, " k"], Float[torch.Tensor, "k d_in"]]:
    """U, σ, Vᵀ of ΔW without forming it: B = Q_b R_b, Aᵀ = Q_a R_a, and the SVD of the small s·R_b·R_aᵀ between."""
    q_b, r_b = torch.linalg.qr(delta.b)
    q_a, r_a = torch.linalg.qr(delta.a.T)
    u, values, vh = torch.linalg.svd(delta.scale * (r_b @ r_a.T), full_matrices=False)
    return q_b @ u, values, vh @ q_a.T


@torch.no_grad()
def spectrum(
    source: Adapter | str | Path,
    base: Base | str | Path | None = None,
    *,
    intruders: bool = False,
    trust_remote_code: bool = False,
) -> list[Spectrum]:
    """The spectrum of every module that an adapter, or full fine-tuning, changed.

    source: an Adapter, an adapter directory, or the directory of a fully fine-tuned model; for the last, `base` is
    the directory (or known name) of what it was tuned from, and one SVD of each difference is taken. For an
    adapter a base is optional: it adds the norms beside, and the intruder dimensions where asked for (two SVDs of
    every adapted weight). Modules without any change are left out of a full model's list. trust_remote_code: as in
    load_base. Raises AdapterError, BaseModelError.
    """
    from postil.adapter.peft_files import CONFIG, load_adapter

    if not isinstance(source, Adapter):
        place = Path(source)
        if not (place / CONFIG).is_file() and (place / "config.json").is_file():
            if base is None:
                raise AdapterError(f"{place} is a whole model; give the directory or name of its base with --base")
            return list(_of_models(place, directory_of(base), intruders))
        source = load_adapter(place)
    if intruders and base is None:
        raise AdapterError("intruder dimensions are found against the base's weights; give the base with --base")
    if base is not None and not isinstance(base, Base):
        from postil.base import load_base

        base = load_base(base, trust_remote_code=trust_remote_code)
    return [_of_delta(delta, base, intruders) for delta in deltas(source)]


def _of_delta(delta: Delta, base: Base | None, intruders: bool) -> Spectrum:
    u, values, vh = svd_of(delta)
    norm, found = None, None
    if base is not None:
        weight = _weight_of(base, delta)
        norm = float(torch.linalg.vector_norm(weight))
        if intruders and not delta.embedding:
            found = intruders_of(weight, weight + ((u * values) @ vh).float())
    return Spectrum(delta.path, delta.b.shape[0], delta.a.shape[1], values, norm, found)


def _weight_of(base: Base, delta: Delta) -> Float[torch.Tensor, "d_out d_in"]:
    """The base's weight at an adapted module in float32, oriented as ΔW."""
    modules = dict(base.model.named_modules())
    if delta.path not in modules:
        raise AdapterError(
            f"{base.source} has no module {delta.path}{nearest(delta.path, modules)}; the adapter is another base's"
        )
    module = modules[delta.path]
    if isinstance(module, Nf4Linear):
        weight, turned = module.dense(torch.float32), module.conv1d
    else:
        weight, turned = module.weight.detach().float(), kind_of(module) in ("conv1d", "embedding")
    weight = weight.T if turned else weight
    if weight.shape != (delta.b.shape[0], delta.a.shape[1]):
        raise AdapterError(
            f"{delta.path} is {list(weight.shape)} in {base.source}, but its ΔW is "
            f"{[delta.b.shape[0], delta.a.shape[1]]}; the adapter is another base's"
        )
    return weight


def intruders_of(
    before: Float[torch.Tensor, "d_out d_in"],
    after: Float[torch.Tensor, "d_out d_in"],
    *,
    top: int = TOP,
    similarity: float = SIMILARITY,
) -> int:
    """How many of the first `top` left singular vectors of `after` have a cosine (its size, as a vector's sign is
    free) below `similarity` with every left singular vector of `before` (Shuttleworth et al. 2024, algorithm 1)."""
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :top]
    return int(((old.T @ new).abs().amax(0) < similarity).sum())


def directory_of(base: Base | str | Path) -> Path:
    """The directory of a base that is read tensor by tensor. Raises BaseModelError for what has none."""
    if isinstance(base, Base):
        if base.directory is None or not base.as_stored:
            raise BaseModelError(f"{base.source} is no directory as it is in memory: give the directory of the base")
        return base.directory
    if str(base) in known_bases():
        return fetch(str(base))
    path = Path(base).expanduser()
    if not path.is_dir():
        raise BaseModelError(f"{base} is no model directory and no known base{nearest(str(base), known_bases())}")
    return path


def _of_models(tuned: Path, base: Path, intruders: bool) -> Iterator[Spectrum]:
    """Matrix by matrix, ΔW = W1 - W0 of the weights that both directories store under one name."""
    after, before = (_matrices(place) for place in (tuned, base))
    pairs: list[tuple[str, str | None, str | None]] = [(name, name, _alike(name, before)) for name in after]
    known = {other for _, _, other in pairs}
    pairs += [(name, _alike(name, after), name) for name in before if name not in known]
    for lacks, has, missing in (
        (base, tuned, [name for name, _, other in pairs if other is None]),
        (tuned, base, [name for name, own, _ in pairs if own is None]),
    ):
        if missing or not after:
            raise BaseModelError(f"{lacks} stores no {listed(missing)}, which {has} has: give the base it came from")
    turned = CONV1D if read_config(base).get("model_type") in CONV1D_MODELS else ()
    for name, mine, other in pairs:
        tensor, own = after[str(mine)], before[str(other)]
        if tensor.shape != own.shape:
            raise BaseModelError(
                f"{name} is {list(tensor.shape)} in {tuned} but {list(own.shape)} in {base}: they are not of one base"
            )
        new, old = read_tensor(tensor).float(), read_tensor(own).float()
        if name.endswith(turned):
            new, old = new.T, old.T
        for values, place in ((new, tuned), (old, base)):
            if not bool(values.isfinite().all()):
                raise BaseModelError(f"{name} holds NaN or infinite values in {place}; there is no spectrum of it")
        change = new - old
        if bool(change.any()):
            found = intruders_of(old, new) if intruders and "embed" not in name else None
            values = torch.linalg.svdvals(change).double()
            path = name.removesuffix(".weight")
            rows, columns = new.shape
            yield Spectrum(path, rows, columns, values, float(torch.linalg.vector_norm(old)), found)


def _alike(name: str, known: Mapping[str, StoredTensor]) -> str | None:
    """The name in `known` that means the same tensor: stored names may lack the inner model's prefix (GPT-2), and a
    head that is the embedding is not stored beside it."""
    if name in known:
        return name
    found = next((other for other in known if name.endswith(f".{other}") or other.endswith(f".{name}")), None)
    if found is None and name == HEAD:
        found = next((other for other in known if other.endswith(EMBEDDINGS)), None)
    return found


def _matrices(directory: Path) -> dict[str, StoredTensor]:
    tensors = stored_tensors(directory)
    if nf4_weights(tensors):
        raise BaseModelError(f"{directory} stores 4-bit weights, whose difference is rounding: give the dense base")
    return {tensor.name: tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.dtype in FLOATS}
