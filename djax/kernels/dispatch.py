"""The one table of back ends: what a program asks for, where it will run, and what computes it there.

`choose` reads `TABLE`. The code that is traced calls it through `run`, and `djax.explain` through
`describe`, so what is explained is what runs. A new back end is one row here and one function in
the operation's own file.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from djax.kernels import native
from djax.kernels.choice import ENVIRONMENT, Kernels, traced_kernels
from djax.kernels.experts_gpu import COLUMNS
from djax.runtime.sharding import MODEL, split

# The platform of a row that stands for every platform.
ANY = "any"
# Tokens up to which an accelerator computes all experts on all of them.
DENSE = 256


class Site(NamedTuple):
    """What a program is traced for, besides the platform that it is lowered for.

    kernels:   which kernels it may have.
    host:      the platform of this process, as `jax.default_backend` names it.
    split:     whether a mesh's model axis splits layers.
    automatic: whether another axis of a mesh splits arrays, and XLA sees to that by itself.
    """

    kernels: Kernels
    host: str
    split: bool = False
    automatic: bool = False


class Attention(NamedTuple):
    """Attention of heads `head_dim` wide, in this dtype."""

    head_dim: int
    dtype: jax.typing.DTypeLike


class Experts(NamedTuple):
    """The expert layer on so many tokens. w_in: the shape `[E, D, 2F]` of the experts' first
    matrices. dtype: of what is computed; held: of the matrices."""

    tokens: int
    w_in: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    held: jax.typing.DTypeLike


class Product(NamedTuple):
    """Rows times a matrix: how many inputs are summed over, and how many outputs there are. dtype:
    of the rows; held: of the matrix."""

    summed: int
    outs: int
    dtype: jax.typing.DTypeLike
    held: jax.typing.DTypeLike


class Peaks(NamedTuple):
    """The likeliest tokens of logits over so many tokens, in this dtype."""

    vocab: int
    dtype: jax.typing.DTypeLike


class Exclude(NamedTuple):
    """Tokens struck from logits of this dtype."""

    dtype: jax.typing.DTypeLike


Case = Attention | Experts | Product | Peaks | Exclude


class BackEnd(NamedTuple):
    """One way to compute an operation.

    name:     the operation's form of this name runs.
    platform: where it may run, or `ANY`.
    why_not:  (case, site) -> why it cannot run there, None if it can.
    says:     what it is, for people to read; empty where it is not printed.
    missing:  what is said of it where another one runs instead; empty: nothing.
    """

    name: str
    platform: str = ANY
    why_not: Callable[[Any, Site], str | None] = lambda case, site: None
    says: str = ""
    missing: str = ""


class Choice(NamedTuple):
    """What was chosen, and what comes before it in the table and why it was not."""

    back_end: BackEnd
    refused: tuple[tuple[BackEnd, str], ...]


def _refuse_library(dtype: jax.typing.DTypeLike, held: jax.typing.DTypeLike, site: Site) -> str | None:
    """Why a program has no C++ functions of djax's. What the machine has is asked last, since the
    first answer takes a compiler seconds."""
    if site.kernels == "xla":
        return f"{ENVIRONMENT}=xla"
    if site.host != "cpu":
        return "this process computes elsewhere"
    if site.kernels == "portable":
        return "the program is to run without djax"
    if site.automatic:
        return "a mesh's axis that XLA splits by itself would have every device compute all"
    return native.why_not(dtype, held)


def _refuse_split(site: Site) -> str | None:
    return "a mesh's axis splits it" if site.split else None


def _refuse_pallas(fits: bool, site: Site) -> str | None:
    if site.kernels == "xla":
        return f"{ENVIRONMENT}=xla"
    return None if fits else "its tiles do not fit"


def _attention_by_pallas(case: Attention, site: Site) -> str | None:
    # It works on halves of heads, whose size must be a power of two, at least 16.
    return _refuse_pallas(case.head_dim in (32, 64, 128, 256), site)


def _attention_by_library(case: Attention, site: Site) -> str | None:
    if case.head_dim % 32:
        return f"heads of width {case.head_dim} are no whole multiple of 32"
    return _refuse_library(case.dtype, case.dtype, site)


def _experts_by_pallas(case: Experts, site: Site) -> str | None:
    _, width, both = case.w_in
    return _refuse_pallas(width % COLUMNS == 0 and both % (2 * COLUMNS) == 0, site)


def _chosen_by_pallas(case: Experts, site: Site) -> str | None:
    if case.tokens <= DENSE:
        return f"up to {DENSE} tokens take all experts"
    return _experts_by_pallas(case, site)


def _experts_by_library(case: Experts, site: Site) -> str | None:
    _, width, both = case.w_in
    if width % 64 or both % 64:
        widths = f"width {width} and expert width {both // 2}"
        return f"{widths} are no whole multiples of 64 and 32"
    return _refuse_library(case.dtype, case.held, site)


def _product_by_library(case: Product, site: Site) -> str | None:
    summed, outs = case.summed, case.outs
    if summed % 16 or outs % 64 or not summed or not outs:
        return f"sums over {summed} and {outs} outputs are no whole multiples of 16 and 64"
    return _refuse_split(site) or _refuse_library(case.dtype, case.held, site)


def _peaks_by_library(case: Peaks, site: Site) -> str | None:
    if case.vocab % 16:
        return f"a vocabulary of {case.vocab} is no whole multiple of 16"
    if case.dtype != jnp.float32:
        return f"logits are {jnp.dtype(case.dtype).name} and not float32"
    return _refuse_split(site) or _refuse_library(case.dtype, case.dtype, site)


def _exclude_in_columns(case: Exclude, site: Site) -> str | None:
    # Where C++ reads the logits next they are in memory, and few columns of them are written.
    # XLA's own operations read them through the other form, and write none of it.
    return _refuse_split(site) or _refuse_library(case.dtype, case.dtype, site)


_ALL_EXPERTS = "all of them on every token"
# For each operation its back ends. The first of a platform, or of `ANY`, that nothing refuses runs;
# the last refuses nothing.
#
# On a CPU only the chosen experts are worth computing (measured: `djax bench speed --parts
# experts`). An accelerator reads every expert's weights for the tokens of a window step anyway,
# and up to about 300 tokens (its FLOPs a second over its bytes a second) that takes longer than
# the products of all experts with all tokens; beyond, on CUDA, two kernels compute the chosen ones.
TABLE: Mapping[type, tuple[BackEnd, ...]] = {
    Attention: (
        BackEnd("Pallas", "cuda", _attention_by_pallas, "one Pallas kernel"),
        BackEnd("C++", "cpu", _attention_by_library, "djax's own C++", "not djax's own C++"),
        BackEnd("XLA", says="XLA's products"),
    ),
    Experts: (
        BackEnd(
            "C++",
            "cpu",
            _experts_by_library,
            "the chosen ones, by djax's own C++",
            "not by djax's own C++",
        ),
        BackEnd("tiles", "cpu", says="the chosen ones, in tiles"),
        BackEnd(
            "Pallas",
            "cuda",
            _chosen_by_pallas,
            f"Pallas kernels: of the chosen ones for over {DENSE} tokens at once, else of {_ALL_EXPERTS}",
        ),
        BackEnd("dense Pallas", "cuda", _experts_by_pallas, f"a Pallas kernel: {_ALL_EXPERTS}"),
        BackEnd("dense", "cuda", says=_ALL_EXPERTS),
        BackEnd("dense", says=_ALL_EXPERTS),
    ),
    Product: (BackEnd("C++", "cpu", _product_by_library), BackEnd("XLA")),
    Peaks: (BackEnd("C++", "cpu", _peaks_by_library), BackEnd("XLA")),
    Exclude: (BackEnd("columns", "cpu", _exclude_in_columns), BackEnd("everywhere")),
}


def choose(case: Case, platform: str, site: Site) -> Choice:
    """Which back end runs for a case in a program of this site that is lowered for this platform.

    platform: "cpu", "cuda", or any other name of jax's ("gpu" means "cuda"). Invariant: in one
    process equal arguments give equal answers; it reads no state but, where the table asks for it,
    whether this machine has djax's C++ functions (`native.why_not`), which never changes.
    """
    platform = "cuda" if platform == "gpu" else platform
    refused: list[tuple[BackEnd, str]] = []
    for back_end in TABLE[type(case)]:
        if back_end.platform not in (platform, ANY):
            continue
        why = back_end.why_not(case, site)
        if why is None:
            return Choice(back_end, tuple(refused))
        refused.append((back_end, why))
    raise AssertionError(f"the last back end of {type(case).__name__} refuses nothing")


def describe(case: Case, site: Site) -> str:
    """What computes a case in a program that this process runs, for people to read."""
    choice = choose(case, site.host, site)
    why = (f"; {one.missing}, since {why}" for one, why in choice.refused if one.missing)
    return choice.back_end.says + "".join(why)


def find_site() -> Site:
    """The site of what is being traced now."""
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.axis_names) - set(mesh.manual_axes) - {MODEL}
    automatic = any(mesh.shape[axis] > 1 for axis in others)
    return Site(traced_kernels(), jax.default_backend(), split(), automatic)


def foresee_site(kernels: Kernels, mesh: Mesh | None) -> Site:
    """The site that the decode of a model on this mesh will be traced for in this process: its
    rows are split by hand (`sharding.over_rows`)."""
    layers_split = mesh is not None and mesh.shape[MODEL] > 1
    return Site(kernels, jax.default_backend(), layers_split)


def run(case: Case, forms: Mapping[str, Callable[..., Any]], *arguments: object) -> Any:
    """The form that `choose` names, on these arguments; forms: one for each back end of the case.

    The site is found now, while tracing; the platform is known once the program is lowered.
    """
    site = find_site()
    platforms = [p for p in dict.fromkeys(one.platform for one in TABLE[type(case)]) if p != ANY]
    chosen = {platform: choose(case, platform, site).back_end for platform in platforms}
    others = {p: forms[one.name] for p, one in chosen.items() if one.platform != ANY}
    default = forms[choose(case, ANY, site).back_end.name]
    # Where several platforms have back ends the question stays in the program although there is
    # one answer: compile caches find programs by their text.
    if not others and len(platforms) == 1:
        return default(*arguments)
    return jax.lax.platform_dependent(*arguments, **others, default=default)
