"""How `subjects.json` was made: Unicode groups minus near-duplicates. Run once; here so that the list can be redone.

Names: Unicode CLDR (`unicode-cldr-core`); groups: Unicode `emoji-test.txt` (`unicode-data`); both under the
Unicode License. Usage: `python -m deploy.reference_models.choose_subjects`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from deploy.reference_models.emoji_data import SUBJECTS_FILE, on_white, render_all

ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
GROUPS = {
    "Smileys & Emotion": "face",
    "People & Body": "person",
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}
# Not things that one can imagine from their name: arrows, letters in boxes, clock hands, gender signs.
LEFT_OUT = {"arrow", "keycap", "alphanum", "geometric", "time", "gender", "av-symbol", "transport-sign", "zodiac",
            "math", "punctuation", "currency", "hair-style", "religion"}
MINIMUM_DISTANCE = 0.2  # RMS over [0, 1] at 32x32; below it two of these images differ in details only
MAXIMUM_WORDS = 4
# These come before anything they resemble: the everyday words with which people try a text-to-image model.
FIRST = {"red apple", "dog", "cat", "red heart", "house", "automobile", "pizza", "hamburger", "sunflower", "star",
         "grinning face", "penguin", "rocket", "birthday cake", "soccer ball", "sailboat", "castle", "robot"}


def plain(name: str) -> str:
    """ASCII lower-case prompt without punctuation: what a person would type."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9 -]", " ", ascii_name.lower())).strip()


def candidates() -> list[tuple[str, str, str]]:
    """(character, name, group) of every single-code-point emoji of `GROUPS`, in Unicode order."""
    names = {a.get("cp"): a.text for a in ElementTree.parse(ANNOTATIONS).getroot().iter("annotation")
             if a.get("type") == "tts"}
    rows, group, subgroup = [], "", ""
    for line in EMOJI_TEST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif "; fully-qualified" in line and group in GROUPS and subgroup not in LEFT_OUT:
            code_points = [chr(int(c, 16)) for c in line.split(";")[0].split() if c != "FE0F"]
            if len(code_points) == 1 and names.get(code_points[0]):
                rows.append((code_points[0], plain(str(names[code_points[0]])), GROUPS[group]))
    return rows


def main() -> None:
    """Write subjects.json."""
    rows = candidates()
    small = on_white(render_all([r[0] for r in rows], 32)).astype(np.float32) / 255
    # Short names first: of two look-alikes the one that is easier to ask for stays.
    order = sorted(range(len(rows)), key=lambda i: (rows[i][1] not in FIRST, len(rows[i][1].split()), i))
    chosen: list[int] = []
    seen: set[str] = set()
    for i in order:
        name = rows[i][1]
        if name in seen or len(name.split()) > MAXIMUM_WORDS or small[i].min() > 0.9:
            continue
        if chosen and np.sqrt(((small[chosen] - small[i]) ** 2).mean(axis=(1, 2, 3))).min() < MINIMUM_DISTANCE:
            continue
        chosen.append(i)
        seen.add(name)
    subjects = [dict(zip(("character", "name", "group"), rows[i], strict=True)) for i in sorted(chosen)]
    SUBJECTS_FILE.write_text(json.dumps(subjects, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(f"{len(rows)} candidates, {len(chosen)} chosen")  # noqa: T201 - a one-off script


if __name__ == "__main__":
    main()
