"""Rows of the official schemas, as lmms-eval's tasks read them, made from the built-in pictures."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from effivlm.zoo import suite

COUNT = 4
LETTERS = "ABCD"
OTHERS = ("seven", "nothing", "a tree", "far away")
SHOWN, TEXT = datasets.Image(), datasets.Value("string")


def asked(kind):
    """Question, accepted answer, and pictures of the built-in task."""
    rows = suite.rows(kind, COUNT)
    return [(r["question"], r["answers"][0], [o() for o in r["images"]]) for r in rows]


def choices(answer, number):
    """Four options, the answer at the place that the number says; the letter of that place."""
    options = list(OTHERS)
    options[number % 4] = answer
    return options, LETTERS[number % 4]


def made(kind, row):
    return [row(i, q, a, p) for i, (q, a, p) in enumerate(asked(kind))]


def lettered(i, a, prefix=""):
    options, letter = choices(a, i)
    return {**dict(zip([prefix + x for x in LETTERS], options, strict=True)), "answer": letter}


def pictures(count, shown, first=1):
    return {
        f"image_{k}": shown[k - first] if k - first < len(shown) else None
        for k in range(first, first + count)
    }


def vqa(kind="scene_qa", **more):
    return made(
        kind,
        lambda i, q, a, p: {
            "image": p[0],
            "question": q,
            "answers": [a] * 10,
            **{k: v(i) for k, v in more.items()},
        },
    )


def mmbench():
    return made(
        "scene_qa",
        lambda i, q, a, p: {
            "image": p[0],
            "question": q,
            "category": f"c{i % 2}",
            "L2-category": "l",
            "l2_category": "l",
            "index": i,
            "hint": "nan",
            "source": "s",
            "split": "dev",
            **lettered(i, a),
        },
    )


def mathvista():
    meta = dict.fromkeys(
        ("split", "language", "source", "category", "task", "context", "grade"), "x"
    ) | {"skills": ["x"]}
    return made(
        "chart",
        lambda i, q, a, p: {
            "decoded_image": p[0],
            "pid": str(i),
            "question": q,
            "query": q,
            "choices": None,
            "answer": "7",
            "question_type": "free_form",
            "answer_type": "integer",
            "unit": None,
            "precision": None,
            "metadata": meta,
        },
    )


def interleaved(sub_task):
    return made(
        "multi_image",
        lambda i, q, a, p: {
            "sample_id": i,
            "question": q,
            "conversations": [{"from": "human", "value": q}],
            "answer": a,
            "question_type": "open-ended",
            "sub_task": sub_task,
            **pictures(2, p, 0),
        },
    )


def video_choices(i, a):
    options, letter = choices(a, i)
    return [f"{x}. {o}" for x, o in zip(LETTERS, options, strict=True)], letter


ROWS = {
    "docvqa_val": lambda: vqa("doc_read", questionId=str),
    "chartqa": lambda: made("chart", lambda i, q, a, p: {"image": p[0], "question": q, "answer": a, "type": ("human_test", "augmented_test")[i % 2]}),
    "textvqa_val": lambda: vqa("ocr", question_id=int, ocr_tokens=lambda i: ["a"]),
    "ocrbench": lambda: made("ocr", lambda i, q, a, p: {"image": p[0], "question": q, "answer": [a], "dataset": "IIIT5K", "question_type": "Regular Text Recognition"}),
    "ai2d": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": q, "options": choices(a, i)[0], "answer": str(i % 4)}),
    "gqa": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": q, "answer": a, "id": str(i), "imageId": str(i)}),
    "mmmu_val": lambda: made("multi_image", lambda i, q, a, p: {"id": f"validation_Art_{i}", "question": f"<image 1> and <image 2> {q}", "options": str(choices(a, i)[0]), "answer": choices(a, i)[1], "question_type": "multiple-choice", **pictures(7, p)}),
    "mme": lambda: made("exist", lambda i, q, a, p: {"image": p[0], "question": q, "answer": a.title(), "question_id": f"q{i // 2}", "category": ("existence", "code_reasoning")[i // 2 % 2]}),
    "realworldqa": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": f"{q}\nA. red\nB. {a}\nPlease answer directly with only the letter of the correct option and nothing else.", "answer": "B"}),
    "mmstar": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": f"{q} {choices(a, i)[0]}", "answer": choices(a, i)[1], "category": "math", "l2_category": "geometry", "index": i}),
    "mathvista_testmini_format": mathvista,
    "mmbench_en_dev_static": mmbench,
    "mmbench_en_dev": mmbench,
    "mmbench_cn_dev": mmbench,
    "mmvet": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": q, "answer": a, "question_id": f"v1_{i}", "capability": "ocr,math"}),
    "multidocvqa_val": lambda: made("doc_read", lambda i, q, a, p: {"questionId": str(i), "question": q, "answers": str([a]), **pictures(20, p * 2)}),
    "mathvision_test": lambda: made("chart", lambda i, q, a, p: {"id": str(i), "question": q, "options": [], "decoded_image": p[0], "answer": "7", "subject": "algebra", "level": 1, "solution": None}),
    "seedbench_2_plus": lambda: made("chart", lambda i, q, a, p: {"image": p[0], "question": q, "question_image_type": ("Chart", "Map", "Web")[i % 3], "question_id": str(i), **lettered(i, a, "choice_")}),
    "mia_bench": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "instruction": q, "components": ["one"], "component_weight": [10.0], "num_of_component": 1, "component_type": ["describe"], "type": "basic"}),
    "scienceqa_img": lambda: made("scene_qa", lambda i, q, a, p: {"image": p[0], "question": q, "choices": choices(a, i)[0], "answer": i % 4, "hint": ""}),
    "pope": lambda: made("exist", lambda i, q, a, p: {"image": p[0], "question": q, "answer": a, "question_id": str(i), "category": "random"}),
    "hallusion_bench_image": lambda: made("exist", lambda i, q, a, p: {"image": p[0], "question": q, "gt_answer": str(int(a == "yes")), "category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": str(i), "question_id": str(i), "sample_note": "", "gt_answer_details": "", "filename": ""}),
    "vizwiz_vqa_val": lambda: vqa(question_id=str, category=lambda i: "other"),
    "llava_interleave_bench_in_domain": lambda: interleaved("Spot-the-Diff"),
    "llava_interleave_bench_out_domain": lambda: interleaved("Mantis"),
    "llava_interleave_bench_multi_view": lambda: interleaved("nuscenes"),
    "flickr30k_test": lambda: made("caption", lambda i, q, a, p: {"image": p[0], "caption": [a, a], "sentids": ["1", "2"], "img_id": str(i), "filename": "x"}),
    "coco2017_cap_val": lambda: made("caption", lambda i, q, a, p: {"image": p[0], "answer": [a, a], "question_id": f"{i:012d}.jpg", "id": i}),
    "mvbench_moving_count": lambda: made("count", lambda i, q, a, p: {"video": f"v{i}.avi", "question": q, "candidates": choices(a, i)[0], "answer": a}),
    "mvbench_object_existence": lambda: made("exist", lambda i, q, a, p: {"video": f"v{i}.avi", "question": q, "candidates": ["yes", "no", "not sure"], "answer": a}),
    "videomme": lambda: made("scene_qa", lambda i, q, a, p: {"video_id": str(i), "videoID": f"v{i}", "question": q, "options": video_choices(i, a)[0], "answer": video_choices(i, a)[1], "duration": "short", "domain": "Knowledge", "sub_category": "Astronomy", "task_type": "Counting Problem", "question_id": str(i)}),
    "egoschema_subset": lambda: made("scene_qa", lambda i, q, a, p: {"question_idx": str(i), "question": q, "video_idx": f"v{i}", "option": [f"{x}. {o}" for x, o in zip("ABCDE", [*choices(a, i)[0], "e"], strict=True)], "answer": str(i % 4)}),
    "longvideobench_val_v": lambda: made("scene_qa", lambda i, q, a, p: {"video_path": f"v{i}.mp4", "question": q, **{f"option{k}": o for k, o in enumerate([*choices(a, i)[0], "N/A"])}, "candidates": choices(a, i)[0], "correct_choice": i % 4, "id": str(i), "duration": 10, "duration_group": 15, "topic_category": "x", "question_category": "S2E", "level": "L1-Perception", "subtitle_path": "x", "video_id": str(i)}),
    "mlvu_dev": lambda: made("scene_qa", lambda i, q, a, p: {"video_name": f"v{i}.mp4", "question": q + "\n" + "\n".join(video_choices(i, a)[0]), "answer": choices(a, i)[1], "task_type": ("count", "plotQA")[i % 2], "duration": 10.0}),
}  # fmt: skip
VIDEOS = (
    "mvbench_video/clevrer/video_validation",
    "videomme/data",
    "egoschema/videos",
    "datasets/longvideobench/videos",
    "mlvu",
)


def write(home: Path, name: str, split: str) -> Path:
    """A folder with the rows of a task, in the split that it asks."""
    folder = home / name
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(ROWS[name]())
    for column, feature in table.features.items():
        if column.startswith("image_") and feature != SHOWN:
            table = table.cast_column(column, SHOWN)  # of pictures that no row has
    table.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
    return folder


def write_videos(home: Path) -> None:
    """The videos of the video tasks, where they look for them."""
    import cv2

    shown = [p[0] for _, _, p in asked("count")]
    for place in VIDEOS:
        (home / place).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(shown):
            pixels = np.asarray(picture.convert("RGB").resize((96, 96), Image.Resampling.NEAREST))[
                :, :, ::-1
            ]
            for suffix, code in ((".avi", "MJPG"), (".mp4", "mp4v")):
                out = cv2.VideoWriter(
                    str(home / place / f"v{i}{suffix}"), cv2.VideoWriter_fourcc(*code), 8, (96, 96)
                )
                for shift in range(12):
                    out.write(np.roll(pixels, shift, 1).copy())
                out.release()
