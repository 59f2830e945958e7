"""Which trajectories are worth learning from: those whose answer is right."""

from collections.abc import Callable

from djax.distill.store import Store, Trajectory
from djax.errors import TraceError
from djax.tasks import verify


def keep(
    store: Store,
    verifier: verify.Verifier | str,
    *,
    least: float = 1.0,
    first: int | None = None,
    verifier_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """The trajectories whose answer's score is at least `least`, in the store's order.

    verifier: a function, or the name of one that ships, whose scores are kept with the parts, so that it is asked once.
    first: only of so many first trajectories, None for all. `progress` is called with the number done. Raises `VerifierError`,
    which leaves the store as it is, and `TraceError` if nothing is kept.
    """
    check = verify.known(verifier)
    shipped = verifier if isinstance(verifier, str) else None
    name = verify.name_of(verifier)
    kept, count, best = [], 0, 0.0
    for n in range(store.parts):
        part = store.part(n)
        if first is not None:
            part = part[: max(first - count, 0)]
        scores = store.scores(n, shipped) if shipped is not None else None
        if scores is None or len(scores) < len(part):
            verify.need([t.problem for t in part], verifier)
            where = f"{store.directory}, part {n}, trajectory "
            scores = [verify.ask(check, t.problem, t.text or "", verifier_seconds, where + str(i)) for i, t in enumerate(part)]
            if shipped is not None:
                store.write_scores(n, shipped, scores)
        scores = scores[: len(part)]
        kept += [t for t, score in zip(part, scores, strict=True) if score >= least]
        count += len(part)
        best = max([best, *scores])
        if progress is not None:
            progress(count)
    if not kept:
        raise TraceError(
            f"{store.directory}: none of {count} trajectories has a score of {least:g} by the verifier {name} (the best has "
            f"{best:g}); record more, with surer settings, or look whether the verifier reads these answers"
        )
    return kept
