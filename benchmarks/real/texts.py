"""Words as images and sentences, written for this bench; calibration and test share no font and no sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_HEIGHT, _WIDTH = 64, 256
_FONTS = {
    "calibration": ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic", "cmss10"),
    "test": ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta", "cmr10", "cmtt10"),
}
_HALVES = {"calibration": 0, "test": 1}
_WORDS = (
    "water paper window garden bridge market winter summer yellow silver doctor teacher kitchen village station library "
    "morning evening picture journey weather history number question answer country mountain river ocean island forest "
    "animal engine machine signal pattern measure distance pressure balance energy motion shadow mirror candle blanket "
    "pocket button ladder hammer needle thread basket bottle butter cheese pepper orange cherry potato carrot rabbit "
    "horse tiger eagle spider salmon turtle monkey dragon castle temple harbor tunnel factory airport hospital museum "
    "theatre quickly slowly gently never always maybe above below between behind around through against during without"
).split()


def words_as_images(half: str, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Images [n, 1, 64, 256] in -1 .. 1 of one word each, dark on light or light on dark, uneven and noisy; the words."""
    random = np.random.default_rng((_HALVES[half], seed))
    own = _WORDS[_HALVES[half] :: 2]
    fonts = [_font(name) for name in _FONTS[half]]
    words = [_word(own, random) for _ in range(n)]
    images = [_rendered(word, fonts[random.integers(len(fonts))], random) for word in words]
    return np.stack(images)[:, None], words


def _word(words: list[str], random: np.random.Generator) -> str:
    kind = random.integers(4)
    if kind == 3:
        return "".join(str(digit) for digit in random.integers(10, size=random.integers(4, 9)))
    word = str(random.choice(words))
    return (word, word.capitalize(), word.upper())[kind]


def _font(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _rendered(word: str, file: Path, random: np.random.Generator) -> np.ndarray:
    font = ImageFont.truetype(str(file), 48)
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (right - left + 16, bottom - top + 16), 0)
    ImageDraw.Draw(image).text((8 - left, 8 - top), word, font=font, fill=255)
    image = image.rotate(random.uniform(-3, 3), resample=Image.Resampling.BICUBIC)
    if random.random() < 0.75:  # what was small or blurred once
        share = random.uniform(0.18, 0.45)
        image = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BILINEAR)
    width = min(_WIDTH, int(image.width * _HEIGHT / image.height))
    ink = np.zeros((_HEIGHT, _WIDTH), np.float32)
    ink[:, :width] = np.asarray(image.resize((width, _HEIGHT), Image.Resampling.BICUBIC), np.float32) / 255
    paper, letters = random.uniform(0.55, 1.0), random.uniform(0.0, 0.4)
    if random.random() < 0.3:
        paper, letters = letters, paper
    grey = paper + (letters - paper) * ink + random.normal(0, random.uniform(0, 0.12), ink.shape)
    return (2 * np.clip(grey, 0, 1) - 1).astype(np.float32)


_SUBJECTS = (
    "the old teacher,my neighbour,a young engineer,the whole team,our cat,the train to the coast,a small company,the doctor,"
    "this new phone,the weather,her brother,the museum in town,an honest judge,the river,the price of bread,a quiet student"
).split(",")
_VERBS = (
    "surprised everyone,arrived late,was praised,made a mistake,changed completely,caused some trouble,helped us a lot,"
    "stayed the same,became popular,failed the first test,grew quickly,was mentioned in the news"
).split(",")
_ENDS = (
    "last summer,after the meeting,because of the rain,in front of the station,without a reason,for the third time,"
    "during the holidays,despite the cost,on a cold morning,as the report explains,when nobody expected it,near the border"
).split(",")
_QUESTIONS = (
    "How do I explain that {s} {v}?",
    "Is it true that {s} {v} {e}?",
    "{s} {v} {e}.",
    "They say {s} {v}.",
    "{e}, {s} {v}.",
    "I read that {s} {v} {e}, and I do not believe it.",
)


def sentences(half: str, seed: int) -> list[str]:
    """Different sentences in the order of the seed; those of the two halves share no subject, verb or ending."""
    random = np.random.default_rng((_HALVES[half], seed))
    own = _HALVES[half]
    subjects, verbs, ends = _SUBJECTS[own::2], _VERBS[own::2], _ENDS[own::2]
    every = [t.format(s=s, v=v, e=e) for t in _QUESTIONS for s in subjects for v in verbs for e in ends]
    unique = list(dict.fromkeys(text[0].upper() + text[1:] for text in every))
    return [unique[i] for i in random.permutation(len(unique))]
