"""Official numbers of a run, with what they do not say: failed, empty and invalid answers."""

from collections.abc import Iterator, Mapping

from effivlm.scores import Scores

Key = tuple[str, str, str]  # model, setting, task


def lines(scores: Mapping[Key, Scores]) -> Iterator[str]:
    """One line for every model, task and setting."""
    width = max((len(f"{t}  {s}") for _, s, t in scores), default=0)
    for (model, setting, task), found in scores.items():
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in _headline_first(found).items())
        counts = [
            f"{number} {what}"
            for what in ("failed", "empty", "invalid")
            if (number := getattr(found, what))
        ]
        said = f"void: {found.void}" if found.void else numbers
        yield (
            f"{model}  {f'{task}  {setting}':{width}}  {said}"
            f"  ({found.documents} documents{''.join(', ' + c for c in counts)})"
        )


def _headline_first(scores: Scores) -> dict[str, float]:
    order = [m.name for m in scores.metrics if m.name in scores.total]
    return {name: scores.total[name] for name in [*order, *scores.total]}
