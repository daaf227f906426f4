"""The documents of the built-in suite: questions on pictures of reserved combinations."""

import functools
import random
from collections.abc import Callable
from typing import Any

from effivlm.zoo.charts import make_chart
from effivlm.zoo.pages import make_page
from effivlm.zoo.scenes import album_question, make_album, make_scene

Asked = tuple[str, str, tuple[Any, ...]]  # question, answer, pictures
LONG = 6  # shapes at least in a scene that is captioned: 30 tokens


def rows(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a built-in task: ``count`` documents, one picture (or album) each, drawn when opened.

    Raises:
        ValueError: for a task that is not rendered here.
    """
    if task not in _TASKS:
        raise ValueError(
            f"no task {task!r} is rendered: expected one of {', '.join(sorted(_TASKS))}"
        )
    number, out = list(_TASKS).index(task), []
    for seed in range(10**7 * (number + 1) + first, 10**7 * (number + 2)):
        asked = _TASKS[task](seed, len(out))
        if asked is not None:
            question, answer, pictures = asked
            images = [functools.partial(type(p).draw, p) for p in pictures]
            out.append({"id": seed, "question": question, "answers": [answer], "images": images})
        if len(out) == count:
            break
    return out


def _one_of(
    make: Callable[[int, bool], Any], kinds: tuple[str, ...], seed: int, turn: int
) -> Asked | None:
    """A question of the kind whose turn it is, if the picture allows it."""
    picture = make(seed, True)
    asked = picture.questions(random.Random(seed)).get(kinds[turn % len(kinds)])
    return None if asked is None else (*asked, (picture,))


def _exist(seed: int, turn: int) -> Asked | None:
    """As many ``yes`` as ``no``."""
    asked = _one_of(make_scene, ("exist",), seed, turn)
    return asked if asked is not None and asked[1] == ("yes", "no")[turn % 2] else None


def _caption(seed: int, turn: int) -> Asked | None:
    asked = _one_of(make_scene, ("caption",), seed, turn)
    return asked if asked is not None and len(asked[2][0].items) >= LONG else None


def _album(seed: int, turn: int) -> Asked | None:
    album = make_album(seed, True, 2 + turn % 3)
    asked = album_question(album, random.Random(seed))
    return None if asked is None else (*asked, album)


_TASKS: dict[str, Callable[[int, int], Asked | None]] = {
    "doc_read": functools.partial(_one_of, make_page, ("field0",)),
    "ocr": functools.partial(_one_of, make_scene, ("number", "word")),
    "chart": functools.partial(_one_of, make_chart, ("value0", "larger")),
    "scene_qa": functools.partial(_one_of, make_scene, ("colour", "shape", "where", "relation")),
    "exist": _exist,
    "count": functools.partial(_one_of, make_scene, ("count",)),
    "caption": _caption,
    "multi_image": _album,
}
