"""Videos decoded in threads, ahead of the code that uses their frames."""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from common.io import UserError, first_line
from common.video import Decoder, Video

QUEUE_FRAMES = 256  # decoded frames of a video that wait to be used


class DecodeThread(threading.Thread):
    """Iterate over a video's frames in order, as `preprocess_frame` returns them: decoded in this thread, and queued.

    Raises UserError after the frames before an error of the decoder. `decoder` has the warnings.
    """

    def __init__(self, video: Video, preprocess_frame: Callable[[np.ndarray], np.ndarray]):
        super().__init__(daemon=True)  # does not keep the process from ending
        self.video, self.decoder, self.preprocess_frame = video, Decoder(video), preprocess_frame
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

    def __iter__(self) -> Iterator[np.ndarray]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, UserError):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread after its current frame. An empty queue lets it go on to notice `stopped`."""
        self.stopped = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.queue.get_nowait()


class VideoPrefetcher:
    """Iterate over (video, DecodeThread) in order; `threads` videos are decoded at the same time.

    OpenCV releases Python's lock while it decodes and resizes.
    """

    def __init__(self, videos: Iterable[Video], preprocess_frame: Callable[[np.ndarray], np.ndarray], threads: int):
        self.videos, self.preprocess_frame, self.threads = videos, preprocess_frame, threads

    def __iter__(self) -> Iterator[tuple[Video, DecodeThread]]:
        videos = iter(self.videos)
        running = deque(DecodeThread(v, self.preprocess_frame) for v in itertools.islice(videos, self.threads))
        try:
            while running:
                yield running[0].video, running[0]
                running.popleft().stop()
                running.extend(DecodeThread(v, self.preprocess_frame) for v in itertools.islice(videos, 1))
        finally:
            for thread in running:
                thread.stop()
