"""Names of videos as files of features, lists and annotations spell them."""

import re
import urllib.parse
from collections.abc import Collection


def original_name(stem: str) -> str:
    """The video's name from which common.io.safe_filename() made `stem`."""
    return urllib.parse.unquote(stem, errors="surrogatepass")


def without_crop(stem: str) -> str:
    return re.sub(r"__\d+$", "", stem)


def without_ending(stem: str) -> str:
    """Without what feature extractors add to a video's name: Abuse028_x264_i3d__3 -> Abuse028_x264."""
    return re.sub(r"_(i3d|x3d|rgb|clip)$", "", without_crop(stem))


def names_of_files(stems: Collection[str]) -> dict[str, str]:
    """{stem: video name}. An ending such as _i3d comes from the extractor if all files have it, else from the video."""
    endings = {without_crop(stem)[len(without_ending(stem)) :] for stem in stems}
    shorten = without_ending if len(endings) == 1 else without_crop
    return {stem: shorten(stem) or original_name(stem) for stem in stems}


def name_in(text: str, names: Collection[str]) -> str | None:
    """Which of `names` a text stands for, with or without folders, suffix, crop number and ending; or None."""
    stem = re.sub(r"\.(npy|mp4|avi|mkv)$", "", re.split(r"[/\\]", text)[-1])
    short = without_ending(stem)
    without_digit = [re.sub(r"_\d$", "", x) for x in (short, stem)]
    spellings = [text, stem, without_crop(stem), short, *without_digit, original_name(stem)]
    return next((x for x in spellings if x in names), None)
