"""A video as a fixed number of images, evenly spaced from its first frame to its last."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from effivlm.tasks.base import MediaError, Question


def framed(question: Question, count: int) -> Question:
    """The question with ``count`` images in the place of every video.

    Raises:
        MediaError: for a video that cannot be read. ImportError: without OpenCV.
    """
    if not question.videos:
        return question
    images, videos = iter(question.images), iter(question.videos)
    shown: list[Image.Image] = []

    def parts(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        for part in message["content"]:
            if part["type"] == "video":
                shown.extend(frames(next(videos), count))
                yield from ({"type": "image"} for _ in range(count))
                continue
            if part["type"] == "image":
                shown.append(next(images))
            yield part

    messages = tuple({**m, "content": list(parts(m))} for m in question.messages)
    return replace(question, messages=messages, images=tuple(shown), videos=())


def frames(path: str, count: int) -> list[Image.Image]:
    """``count`` frames of a video file, RGB.

    Raises:
        MediaError: if the file or one of the frames cannot be read. ImportError: without OpenCV.
    """
    try:
        import cv2  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise ImportError(
            "videos need OpenCV: pip install opencv-python-headless (`make benchmarks` has it)"
        ) from None
    video = cv2.VideoCapture(path)
    try:
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if total <= 0:
            raise MediaError(f"cannot read video {path}")
        out: list[Image.Image] = []
        for number in np.linspace(0, total - 1, count).round().astype(int).tolist():
            video.set(cv2.CAP_PROP_POS_FRAMES, number)
            read, frame = video.read()
            if not read:
                raise MediaError(f"cannot read frame {number} of {total} of video {path}")
            out.append(Image.fromarray(frame[:, :, ::-1].copy()))
        return out
    finally:
        video.release()
