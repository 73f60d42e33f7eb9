"""Videos decoded ahead of whoever uses them, in threads: OpenCV lets go of Python's lock while it decodes and resizes."""

import queue
import threading

from common.io import UserError, first_line
from common.video import Decoder

AHEAD = 256  # decoded frames that wait per video


class VideoPrefetcher:
    """Decode and resize several videos in threads (OpenCV lets go of Python's lock); yields (video, its frames in order)."""

    def __init__(self, videos, preprocess_frame, threads):
        self.videos, self.preprocess_frame, self.threads = videos, preprocess_frame, threads

    def __iter__(self):
        sources = [Source(v, self.preprocess_frame) for v in self.videos]
        for i, s in enumerate(sources):
            for ahead in sources[i : i + self.threads]:
                ahead.start()
            try:
                yield s.video, s
            finally:
                s.stop()


class Source:
    """One video's frames, resized, from a thread of its own into a bounded queue."""

    def __init__(self, video, preprocess_frame):
        self.video, self.preprocess_frame, self.decoder = video, preprocess_frame, Decoder(video)
        self.queue, self.thread, self.stopped = queue.Queue(AHEAD), None, threading.Event()

    def start(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self._read, daemon=True)
            self.thread.start()

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _read(self):
        try:
            for frame in self.decoder:
                self._put(self.preprocess_frame(frame))
                if self.stopped.is_set():
                    return
            self._put(None)
        except UserError as e:
            self._put(e)
        except Exception as e:  # whatever a decoder raises belongs to this one video
            self._put(UserError(f"video {self.video.name} ({self.video.path}) cannot be read ({first_line(e)})"))

    def __iter__(self):
        while (item := self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def stop(self):
        self.stopped.set()
