"""Videos decoded in threads, ahead of the code that uses them. OpenCV releases Python's lock while it decodes."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from common.io import UserError, first_line
from common.readers.video import Decoder, Video

QUEUE_FRAMES = 256  # decoded frames of a video that wait to be used


class DecodeThread(threading.Thread):
    """Decodes one video. Iterate over its frames, in order and as preprocess_frame() returns them. Raises UserError."""

    def __init__(self, video, preprocess_frame):
        super().__init__(daemon=True)  # does not keep the process from ending
        self.video, self.decoder = video, Decoder(video)
        self.preprocess_frame = preprocess_frame
        self.queue, self.stopped = queue.Queue(QUEUE_FRAMES), False
        self.start()

    def run(self):
        end = None
        try:
            for frame in self.decoder:
                self.queue.put(self.preprocess_frame(frame))
                if self.stopped:
                    return
        except UserError as e:
            end = e
        except Exception as e:  # decoders raise many kinds
            end = UserError(f"video {self.video.name} ({self.video.path}) cannot be read ({first_line(e)})")
        self.queue.put(end)

    def __iter__(self):
        while (item := self.queue.get()) is not None:
            if isinstance(item, UserError):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread after the frame that it decodes now: put() cannot block where nothing is in the queue."""
        self.stopped = True
        while not self.queue.empty():
            self.queue.get()


def decode_ahead(
    videos: Iterable[Video], preprocess_frame: Callable[[np.ndarray], np.ndarray], threads: int
) -> Iterator[tuple[Video, DecodeThread]]:
    """Yield (video, its DecodeThread); the next `threads` videos are decoded at the same time."""
    waiting = (DecodeThread(video, preprocess_frame) for video in videos)  # each begins when it is taken
    running = deque(itertools.islice(waiting, threads))
    try:
        while running:
            yield running[0].video, running[0]
            running.popleft().stop()
            running.extend(itertools.islice(waiting, 1))
    finally:
        for thread in running:
            thread.stop()


def encode_videos(
    videos: list[Video], preprocess_frame: Callable, encode: Callable, workers: int, show: bool
) -> dict[str, str]:
    """Decode videos ahead and call encode(video, its DecodeThread, tick) for each; tick(n) counts n frames.

    show: a progress bar. -> {video key: why} of those that raised UserError
    """
    total, failed = sum(v.expected_frames() for v in videos), {}
    with tqdm(total=total, desc="encode", unit="frame", dynamic_ncols=True, mininterval=2, disable=not show) as bar:
        for video, frames in decode_ahead(videos, preprocess_frame, max(1, min(workers, 4))):
            try:
                encode(video, frames, bar.update)
            except UserError as e:
                failed[video.key] = str(e)
    return failed
