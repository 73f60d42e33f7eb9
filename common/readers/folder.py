"""Your own videos, --dataset folder: train/ and test/ with videos or folders of frames, and labels if there are any."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from common.io import UserError
from common.readers.dataset import Dataset, choose_labels, search
from common.readers.labels import FOLDER, csv_ranges, entries_of_videos, frame_labels, read_masks, read_tracks
from common.readers.splits import SPLITS, child_folders, split_folders, videos
from common.readers.video import list_videos, shortened


def read_dataset(name: str, root: Path) -> Dataset:
    """Your videos: train/ and test/ (or only videos: then all are test), with labels if there are any.

    Labels: labels/<video>.npy or .txt (0/1 per frame), or labels.csv with lines video,start,end (0-based frames, end
    exclusive; a video without a line is normal). Masks: masks/<video>.npy, .npz (array `masks`) or a folder of images.
    Tracks: tracks/<video>.csv. A scene is what stands before the first underscore of a name, if all have one.
    Raises UserError.
    """
    folders = {split: split_folders(root, split) for split in SPLITS}
    for split in SPLITS:
        empty = next((p for p in child_folders(root, SPLITS[split]) if any(p.iterdir())), None)
        if empty and not folders[split]:
            entries = sorted(empty.iterdir())
            raise UserError(
                f"{empty} holds no video: {len(entries)} entries, such as {entries[0].name}, are of no kind that is "
                "read; convert videos with ffmpeg -i IN OUT.mp4"
            )
    if any(folders.values()):
        data = Dataset(name, root, *(videos(folders[split], split) for split in SPLITS))
    else:
        data = Dataset(name, root, [], list_videos(root, "test"))
    all_videos, names = data.train + data.test, {v.name for v in data.test}
    if not all_videos:
        content = shortened(sorted(p.name for p in root.iterdir()), 12)
        looked = "looked for train/ and test/ with videos or folders of frames"
        raise UserError(f"--data-root {root} holds no videos: {looked}; found {content}")
    if all("_" in v.name for v in all_videos):
        for v in all_videos:
            v.scene = v.name.split("_")[0]
    data.label_forms = "labels/<video>.npy or .txt, labels.csv (video,start,end), or masks/ of every test video"
    places, kinds = ("labels", "test_labels", "test_frame_mask"), (".npy", ".txt")
    labels, source, others = files_of_videos(root, places, kinds, names, frame_labels)
    if others:
        data.not_understood = f"{others}: not named after a test video such as {min(names, default='')}.npy"
    places, kinds = ("masks", "test_pixel_mask"), (".npy", ".npz", FOLDER)
    data._masks, data.mask_source, _ = files_of_videos(root, places, kinds, names, read_masks)
    data._tracks, _, _ = files_of_videos(root, ("tracks",), (".csv", ".txt"), names, read_tracks)
    sources = [(source, labels)]
    for table in search(root, r"labels\.csv", depth=1)[:1]:
        try:
            sources.append((table.name, csv_ranges(table, names)))
        except UserError as e:
            if not labels:
                raise
            print(f"note: labels are those of {source}; {table.name} is not compared ({e})", flush=True)
    choose_labels(data, sources)
    return data


def files_of_videos(root, places, kinds, names: Collection[str], read: Callable) -> tuple[dict, str, str]:
    """Files of folders `places` named after a video of `names`; the last place counts.

    kinds: suffixes, and FOLDER; read(path) -> array. -> ({video: function that reads its file}, "place/" or "none",
    "place/ holds …" other files, or "")
    """
    readers, source = {}, "none"
    sentence = ""
    for place in child_folders(root, places):
        pairs, others = entries_of_videos(sorted(place.iterdir()), kinds, names)
        readers.update({video: partial(read, place / file) for video, file in pairs})
        source = f"{place.name}/" if pairs else source
        if others:
            sentence = f"{place.name}/ holds {shortened(others, 3)}"
    return readers, source, sentence
