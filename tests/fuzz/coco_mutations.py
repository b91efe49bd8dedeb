"""Data sets in COCO's format that are broken in one way or several."""

import copy
import json
import re
from typing import Any, Callable, List, NamedTuple

import coco_data
import numpy as np
from hypothesis import strategies as st
from PIL import Image

HEIGHT, WIDTH = coco_data.SIZE
IMAGES = 4
NAN, INF = float("nan"), float("inf")

# What a key may hold instead: every type, and of each what is unusual.
ODD_VALUES = [None, True, False, 0, 1, -1, 2, 7.0, 0.5, -0.0, 2**31, 2**53 + 1, 2**64, 10**400, 1e-40, 1e300, NAN, INF]
ODD_VALUES += [-INF, "", "1", "7", "\ud800", "\0", [], [0], [1, 2, 3, 4], [[1, 2]], [[]], {}, {"id": 1}, {"a": None}]
NUMBERS = [0, 1, -1, 0.5, 3, 10, 48, 64, 65, 100, 1e-9, 1e-40, 1e5, 1e9, -1e9, 1e300, -1e300, 10**30, NAN, INF, -INF]
_NESTED = "lists in lists: "
ANNOTATION_KEYS = ["id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "ignore", "keypoints"]
ANNOTATION_KEYS += ["num_keypoints"]
KEYS = {
    "images": ["id", "file_name", "height", "width"],
    "annotations": ANNOTATION_KEYS,
    "categories": ["id", "name"],
}


class BrokenSet(NamedTuple):
    """A json to be, and what was done to it."""

    text: bytes
    changes: List[str]


def sound_content(rles: bool = True, keypoints: bool = False) -> dict:
    """Four images with six annotations: polygons, a crowd, and (``rles``) an object whose mask is an RLE.

    With ``keypoints``, each annotation has three points.
    """
    content = coco_data.content(IMAGES)
    mask = np.zeros(coco_data.SIZE, dtype=np.uint8)
    mask[10:22, 8:28] = 1
    plain, packed = coco_data.plain_rle(mask), coco_data.rle(mask)
    content["annotations"] += [
        coco_data.annotation(11, image_id=2, segmentation=plain, iscrowd=int(not rles)),
        coco_data.annotation(12, image_id=2, segmentation=packed, iscrowd=1, bbox=[0.5, 0.25, 30.5, 20.25]),
        coco_data.annotation(13, image_id=3, bbox=[-0.5, 3, 65, 8], category_id=91),
    ]
    if keypoints:
        for entry in content["annotations"]:
            entry.update(keypoints=[9, 11, 2, 18.5, 16, 1, 27, 21, 2], num_keypoints=3)
    return content


def write_images(root) -> None:
    """The images of :func:`sound_content`, and some that file names may be changed to."""
    coco_data.write(root, sound_content())
    images = root / "images"
    whole = (images / "1.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("no image")
    (images / "folder.png").mkdir()
    small = Image.fromarray(np.zeros((HEIGHT, WIDTH // 2, 3), dtype=np.uint8))
    small.save(images / "small.png")
    # Of a camera that was held upright: as wide as it is told only after its EXIF orientation.
    turned = Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(images / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint8)).save(images / "grey.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 4080, dtype=np.uint16)).save(images / "deep.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.float32)).save(images / "float.tif")
    (root / "outside.png").write_bytes(whole)


FILE_NAMES = ["cut.png", "empty.png", "text.png", "folder.png", "small.png", "turned.jpg", "grey.png", "../outside.png"]
FILE_NAMES += [
    "deep.png",
    "float.tif",
    "1.png",
    "./2.png",
    "nowhere.png",
    "../nowhere/1.png",
    "",
    ".",
    "..",
    "/",
    "/dev/zero",
    "a\0b/1.png",
]
FILE_NAMES += ["\ud800/1.png", "x" * 300 + ".png", "http://localhost/1.png", "folder.png/1.png", "~/1.png", "ä.png"]


# ------------------------------------------------------------------ mutations: each changes the content, and says what
def _entry(draw: Callable, content: dict, part: str = "") -> tuple:
    part = part or draw(st.sampled_from(list(KEYS)))
    entries = content.get(part)
    entries = entries if isinstance(entries, list) else []
    places = [place for place, entry in enumerate(entries) if isinstance(entry, dict)]
    return part, entries, draw(st.sampled_from(places)) if places else None


def _delete_key(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    key = draw(st.sampled_from(KEYS[part]))
    entries[place].pop(key, None)
    return f"{part}[{place}] without {key}"


def _rename_key(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    key = draw(st.sampled_from(KEYS[part]))
    entries[place][key.upper()] = entries[place].pop(key, None)
    return f"{part}[{place}].{key} in capitals"


def _swap_value(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    key, value = draw(st.sampled_from(KEYS[part])), draw(st.sampled_from(ODD_VALUES))
    entries[place][key] = copy.deepcopy(value)
    return f"{part}[{place}].{key} = {value!r:.40}"


def _swap_entry(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    entries[place] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return f"{part}[{place}] = {entries[place]!r:.40}"


def _swap_part(draw, content):
    part = draw(st.sampled_from([*KEYS, "info", "licenses"]))
    action = draw(st.sampled_from(["delete", "empty", "odd", "object", "nest"]))
    if action == "delete":
        content.pop(part, None)
    else:
        old = content.get(part)
        values = {"empty": [], "object": {"0": old}, "nest": [old], "odd": copy.deepcopy(draw(_odd))}
        content[part] = values[action]
    return f"{action} {part}"


def _duplicate_entry(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    entries.insert(draw(st.integers(0, len(entries))), copy.deepcopy(entries[place]))
    return f"{part}[{place}] twice"


def _shuffle(draw, content):
    part = draw(st.sampled_from(list(KEYS)))
    if isinstance(content.get(part), list):
        content[part] = draw(st.permutations(content[part]))
    return f"{part} in another order"


def _reference(draw, content):
    part, key = draw(
        st.sampled_from([*[("annotations", key) for key in ANNOTATION_KEYS[:3]]] + [(p, "id") for p in KEYS])
    )
    part, entries, place = _entry(draw, content, part)
    if place is None:
        return "nothing"
    ids = [1, 2, 3, 4, 7, 20, 91, 0, -1, 99, 1.0, 2.5, "1", True, 2**53, 2**63, 2**63 - 1, NAN, INF, 10**400]
    entries[place][key] = draw(st.sampled_from(ids))
    return f"{part}[{place}].{key} = {entries[place][key]!r:.40}"


def _renumber(draw, content):
    """All images get ids of another type or size, and their annotations follow: nothing is wrong with most."""
    kind = draw(st.sampled_from(["text", "float", "large", "huge", "negative"]))
    new = {
        "text": str,
        "float": float,
        "large": lambda n: 2**62 + n,
        "huge": lambda n: 10**30 + n,
        "negative": int.__neg__,
    }
    for part, key in (("images", "id"), ("annotations", "image_id")):
        for entry in content.get(part) or [] if isinstance(content.get(part), list) else []:
            if isinstance(entry, dict) and type(entry.get(key)) is int and entry[key] < 10**300:
                entry[key] = new[kind](entry[key])
    return f"image ids are {kind}"


def retyped(value: Any, new_type: type) -> Any:
    """A value of the json whose whole numbers have another type."""
    if isinstance(value, dict):
        return {key: retyped(inner, new_type) for key, inner in value.items()}
    if isinstance(value, list):
        return [retyped(inner, new_type) for inner in value]
    return new_type(value) if type(value) is int and abs(value) < 2**53 else value


def _number_type(draw, content):
    """A number of the right value and another type, in one entry or in all."""
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    key = draw(st.sampled_from([*KEYS[part], "segmentation"] if part == "annotations" else KEYS[part]))
    new_type = draw(st.sampled_from([float, bool]) if key in ("iscrowd", "num_keypoints") else st.just(float))
    chosen = [entries[place]] if draw(st.booleans()) else [entry for entry in entries if isinstance(entry, dict)]
    for entry in chosen:
        if key in entry:
            entry[key] = retyped(entry[key], new_type)
    return f"{len(chosen)} of {part}: {key} is a {new_type.__name__}"


def _box(draw, content):
    _, entries, place = _entry(draw, content, "annotations")
    if place is None:
        return "nothing"
    box = draw(st.lists(st.sampled_from(NUMBERS), min_size=4, max_size=4) | st.lists(_odd, max_size=5))
    entries[place]["bbox"] = box
    return f"annotations[{place}].bbox = {box!r:.60}"


def _one_side(draw, content):
    _, entries, place = _entry(draw, content, "annotations")
    if place is None or not isinstance(entries[place].get("bbox"), list) or not entries[place]["bbox"]:
        return "nothing"
    box = entries[place]["bbox"]
    box[draw(st.integers(0, len(box) - 1))] = draw(st.sampled_from(NUMBERS))
    return f"annotations[{place}].bbox = {box!r:.60}"


def _polygons(draw, content):
    _, entries, place = _entry(draw, content, "annotations")
    if place is None:
        return "nothing"
    sound = st.just([8, 10, 28, 10, 28, 22, 8, 22.5])
    odd = st.lists(st.sampled_from(NUMBERS), max_size=9) | st.lists(st.integers(0, 40), max_size=7) | _odd
    polygons = draw(st.lists(sound | odd, max_size=3))
    entries[place]["segmentation"] = copy.deepcopy(polygons)
    return f"annotations[{place}].segmentation = {polygons!r:.80}"


def _rle(draw, content):
    _, entries, place = _entry(draw, content, "annotations")
    if place is None:
        return "nothing"
    pixels = HEIGHT * WIDTH
    rle = copy.deepcopy(draw(st.sampled_from([e["segmentation"] for e in sound_content()["annotations"][-3:-1]])))
    counts, kind = rle["counts"], draw(st.integers(0, 7))
    if kind == 0:
        rle["counts"] = counts[: draw(st.integers(0, len(counts) - 1))]
    elif kind == 1 and isinstance(counts, str):
        at = draw(st.integers(0, len(counts) - 1))
        rle["counts"] = counts[:at] + chr(draw(st.integers(40, 120))) + counts[at + 1 :]
    elif kind == 2:
        rle["size"] = draw(st.sampled_from([[WIDTH, HEIGHT], [HEIGHT], [0, 0], [-48, -64], [48.0, 64.0], "48", None]))
    elif kind == 3:
        lists = [[1.5, pixels - 1.5], [pixels], [0, pixels], [pixels + 1, -1], [2**32, pixels - 2**32], [[pixels]]]
        rle["counts"] = draw(st.sampled_from([*lists, [True, pixels - 1], [NAN, pixels], [float(pixels)], ["a"]]))
    elif kind == 4:
        rle["counts"] = "o" * draw(st.sampled_from([3, 20, 200_000]))
    elif kind == 5:
        rle["counts"] = copy.deepcopy(draw(_odd))
    elif kind == 6:
        rle.pop(draw(st.sampled_from(["size", "counts"])))
    else:
        entries[place]["iscrowd"] = draw(st.sampled_from([0, 1, True, 2, "0", None]))
    entries[place]["segmentation"] = rle
    return f"annotations[{place}].segmentation = {rle!r:.80}"


def _keypoints(draw, content):
    _, entries, place = _entry(draw, content, "annotations")
    if place is None:
        return "nothing"
    values = [
        [1, 2, 2] * 17,
        [],
        [5, 6, 1] * 3,
        [0, 0, 0] * 3,
        [9, 11, True] * 3,
        [1, 2],
        [None] * 51,
        ["a", "b", "c"],
        5,
        "abc",
        {"x": 1},
        [NAN, 1, 2],
        [1.5, 2.5, 1],
    ]
    value = draw(st.sampled_from(values))
    entries[place].update(
        keypoints=copy.deepcopy(value), num_keypoints=draw(st.sampled_from([17, 3, 0, 3.0, True, None]))
    )
    return f"annotations[{place}].keypoints = {value!r:.40}"


def _file_name(draw, content):
    _, entries, place = _entry(draw, content, "images")
    if place is None:
        return "nothing"
    entries[place]["file_name"] = draw(st.sampled_from(FILE_NAMES))
    return f"images[{place}].file_name = {entries[place]['file_name']!r:.40}"


def _image_size(draw, content):
    _, entries, place = _entry(draw, content, "images")
    if place is None:
        return "nothing"
    key = draw(st.sampled_from(["height", "width"]))
    entries[place][key] = draw(st.sampled_from([47, 48.0, 64.0, 48.5, 0, -48, "48", 10**400, 1e300, NAN, True]))
    return f"images[{place}].{key} = {entries[place][key]!r:.40}"


def _category(draw, content):
    _, entries, place = _entry(draw, content, "categories")
    if place is None:
        return "nothing"
    entries[place]["name"] = draw(st.sampled_from(["car", "", " ", "ä", "\0", "x" * 5000, "\n"]))
    return f"categories[{place}].name = {entries[place]['name']!r:.20}"


def _extra_key(draw, content):
    part, entries, place = _entry(draw, content)
    if place is None:
        return "nothing"
    # As text: json's own writer has a limit, too.
    depth = draw(st.sampled_from([1, 10, 300]) | st.integers(850, 1000))
    entries[place]["attributes"] = f"{_NESTED}{depth}"
    return f"{part}[{place}] has nested attributes"


_odd = st.sampled_from(ODD_VALUES)
MUTATIONS = [_delete_key, _rename_key, _swap_value, _swap_value, _swap_entry, _swap_part, _duplicate_entry, _shuffle]
MUTATIONS += [_reference, _reference, _renumber, _box, _one_side, _one_side, _polygons, _polygons, _rle, _rle]
MUTATIONS += [
    _number_type,
    _number_type,
    _keypoints,
    _keypoints,
    _file_name,
    _file_name,
    _image_size,
    _category,
    _extra_key,
]
MUTATIONS += [_number_type, _number_type]


# ------------------------------------------------------------------ the bytes of the file
def _encoded(draw: Callable, content: Any, changes: List[str]) -> bytes:
    text = re.sub(f'"{_NESTED}(.*?)"', lambda match: "[" * int(match[1]) + "]" * int(match[1]), json.dumps(content))
    kind = draw(
        st.sampled_from(["plain"] * 12 + ["bom", "cut", "noise", "latin", "utf16", "deep", "twice", "empty", "tail"])
    )
    if kind != "plain":
        changes.append(kind)
    data = text.encode("utf-8")
    at = draw(st.integers(0, len(data))) if kind in ("cut", "noise") else 0
    return {
        "plain": lambda: data,
        "bom": lambda: b"\xef\xbb\xbf" + data,
        "cut": lambda: data[:at],
        "noise": lambda: (
            data[:at] + bytes(draw(st.lists(st.integers(0, 255), min_size=1, max_size=3))) + data[at + 1 :]
        ),
        "latin": lambda: data.replace(b'"ship"', '"Fähre"'.encode("latin-1")),
        "utf16": lambda: text.encode("utf-16"),
        "deep": lambda: data[:-1] + b', "info": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "twice": lambda: data[:-1] + b', "images": []}',
        "empty": lambda: b"",
        "tail": lambda: data + b"\n}",
    }[kind]()


@st.composite
def broken_sets(draw, rles: bool = True, keypoints: bool = False) -> BrokenSet:
    """A json of :func:`sound_content` after one to three mutations."""
    content = sound_content(rles, keypoints)
    changes = [draw(st.sampled_from(MUTATIONS))(draw, content) for _ in range(draw(st.integers(1, 3)))]
    return BrokenSet(_encoded(draw, content, changes), changes)
