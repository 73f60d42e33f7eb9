"""A frame keeps its number, time and picture: all codecs, pixel formats, containers that ffmpeg writes and users have.

Every picture carries its number as a row of squares, so that what comes out is compared with what went in.
"""

import os
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from common import evaluation, own_video
from common.cache import FrameCache
from common.io import UserError
from common.readers.container import Clock, read_container
from common.readers.pictures import read_image
from common.readers.video import Decoder, Video, list_videos, open_video
from common.report import page, plots, ranking
from tests.corpus import LACKING, PLAIN, RATES, X264
from tests.helpers import save_frames
from tests.test_report import content

FRAMES, RATE = 30, 25
SIZE = (48, 64)
RED = slice(34, 46), slice(40, 60)  # where every picture is red


def pictures(frames=FRAMES):
    """uint8 [T, 48, 64, 3] BGR: five squares in the top row are the bits of the frame's number, one below is red."""
    out = np.full((frames, *SIZE, 3), 70, np.uint8)
    out[:, (*RED,)[0], (*RED,)[1]] = (20, 20, 220)
    for t in range(frames):
        for bit in range(5):
            out[t, 2:16, 2 + 12 * bit : 12 + 12 * bit] = 235 if t >> bit & 1 else 15
    return out


def number(frame):
    """What the squares of a decoded frame say, whatever its size."""
    grey = frame if frame.ndim == 2 else frame.mean(axis=2)
    sy, sx = grey.shape[0] / SIZE[0], grey.shape[1] / SIZE[1]
    return sum(
        int(grey[int(6 * sy) : int(12 * sy), int((5 + 12 * b) * sx) : int((9 + 12 * b) * sx)].mean() > 127) << b
        for b in range(5)
    )


def decode(path):
    """-> (numbers in the pictures, seconds of the frames, frames, warnings)"""
    decoder = Decoder(open_video(path))
    frames = list(decoder)
    return [number(f) for f in frames], [decoder.clock.seconds(t) for t in range(len(frames))], frames, decoder.warnings


UNEVEN = r"settb=1/1000,setpts=if(lt(N\,10)\,N*400\,4000+(N-10)*40)"
UNEVEN_TIMES = [0.4 * n if n < 10 else 4 + 0.04 * (n - 10) for n in range(FRAMES)]
WITH_SOUND = "-f lavfi -i sine=d=2"


def ffmpeg(*words):
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", *map(str, words)], capture_output=True, text=True
    )
    return done.stderr.strip() if done.returncode else None


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """make("name.ext options") -> a video of the pictures above, written by ffmpeg; skipped where that cannot be."""
    if not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg, which makes the videos, is not on this machine")
    folder = tmp_path_factory.mktemp("made")
    (folder / "raw").write_bytes(pictures().tobytes())

    def write(how, before=()):
        name, *options = how.split()
        path = folder / f"{len(list(folder.iterdir()))}-{name}"
        failed = ffmpeg(
            "-f",
            "rawvideo",
            "-pix_fmt",
            "bgr24",
            "-s",
            f"{SIZE[1]}x{SIZE[0]}",
            "-r",
            RATE,
            "-i",
            folder / "raw",
            *before,
            *options,
            path,
        )
        lacks = [x for x in (failed or "").splitlines() if "Unknown encoder" in x or "not currently supported" in x]
        if lacks:
            pytest.skip(f"this ffmpeg cannot write it: {lacks[0]}")
        assert failed is None, failed
        return path

    return write


@pytest.mark.parametrize("title", PLAIN)
def test_every_frame_has_its_picture_and_its_time(make, title):
    numbers, seconds, frames, said = decode(make(PLAIN[title]))
    if title == "h264 NTSC":
        assert len(frames) == 36 and np.allclose(seconds, np.arange(36) * 1001 / 30000, atol=1e-3) and said == []
        return
    rate = RATES.get(title, RATE)
    assert numbers == list(range(FRAMES)), (numbers, said)
    assert np.allclose(seconds, np.arange(FRAMES) / rate, atol=1e-3) and said == []
    red = frames[3][int(frames[3].shape[0] * 0.8), int(frames[3].shape[1] * 0.78)].astype(int)
    assert frames[3].dtype == np.uint8 and frames[3].shape[2] == 3
    assert red[2] > red[1] + 40 and red[2] > red[0] + 40 or "grey" in title or "gray" in PLAIN[title], red


@pytest.mark.parametrize("title", LACKING)
def test_a_codec_that_opencv_lacks_is_named_with_the_way_out(make, title):
    try:
        assert decode(make(LACKING[title]))[0] == list(range(FRAMES))
    except UserError as e:
        assert "ffmpeg -i" in str(e) and "codec" in str(e) and "\n" not in str(e), e


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts", "webm"])
def test_uneven_times_are_those_of_the_container(make, suffix):
    codec = "-c:v libvpx" if suffix == "webm" else X264 + " -bf 2"
    numbers, seconds, _, said = decode(
        make(
            f"a.{suffix} {codec} -vsync vfr -video_track_timescale 1000 -vf {UNEVEN}"
            if suffix in ("mp4", "mov")
            else f"a.{suffix} {codec} -vsync vfr -vf {UNEVEN}"
        )
    )
    assert numbers == list(range(FRAMES)) and np.allclose(seconds, UNEVEN_TIMES, atol=2e-3) and said == []


def test_sound_that_begins_first_does_not_move_frames(make):
    path = make(f"a.mp4 {X264} -c:a aac -map 0:v -map 1:a -shortest", before=WITH_SOUND.split())
    assert decode(path)[0] == list(range(FRAMES))


def test_a_video_cut_without_encoding_has_the_frames_that_players_show(make, tmp_path):
    path = make(f"a.mp4 {X264} -bf 2 -g 10")
    assert ffmpeg("-ss", "0.5", "-i", path, "-c", "copy", tmp_path / "cut.mp4") is None
    numbers = decode(tmp_path / "cut.mp4")[0]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and 12 <= len(numbers) <= 20


def test_a_container_that_turns_its_picture(make, tmp_path):
    path = make(f"a.mp4 {X264}")
    assert ffmpeg("-i", path, "-c", "copy", "-metadata:s:v", "rotate=90", tmp_path / "turned.mp4") is None
    frame = next(iter(Decoder(open_video(tmp_path / "turned.mp4"))))
    assert frame.shape == (64, 48, 3)


@pytest.mark.parametrize(
    "how",
    [
        f"a.ts {X264} -x264opts tff=1 -flags +ildct+ilme",
        "a.ts -c:v mpeg2video -flags +ildct+ilme",
        "a.avi -c:v dvvideo -s 720x576 -pix_fmt yuv420p",
    ],
)
def test_interlaced_is_right_or_pointed_out(make, how):
    numbers, _, frames, said = decode(make(how))
    assert len(frames) == FRAMES
    assert numbers == list(range(FRAMES)) or ["yadif" in x for x in said] == [True], said


def damaged(path, first, last, fill=None):
    """Overwrite the packets of frames first..last of an MJPEG .avi (in others, about these), their headers too."""
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data) - 4) if data[i : i + 4] == b"00dc" and data[i + 8 : i + 10] == b"\xff\xd8"]
    a, b = starts[first] + (8 if fill else 0), starts[last + 1]
    for i in range(a, b if not fill else a + fill):
        data[i] = 0
    path.write_bytes(data)


def test_frames_lost_in_the_middle_are_repeated_and_named(make):
    """The whole of some packets is zero, as on a disk with bad sectors: the reader of an AVI closes the gap."""
    path = make("a.avi -c:v mjpeg -q:v 2")
    damaged(path, 10, 14)
    numbers, seconds, _, said = decode(path)
    assert numbers == [*range(10), *[9] * 5, *range(15, 30)] and seconds[20] == pytest.approx(0.8)
    assert said == ["5 frames could not be decoded and were replaced by the one before: frames 10..14 (0.40..0.56 s)"]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_one_damaged_packet_does_not_end_the_video(make, suffix):
    path = make(
        f"a.{suffix} {X264} -g 1 -bf 0 -q:v 2 -flags -global_header"
        if suffix == "ts"
        else f"a.{suffix} -c:v mjpeg -q:v 2"
    )
    data = bytearray(path.read_bytes())
    if suffix == "ts":
        for k in range(len(data) // 188 // 2, len(data) // 188 // 2 + 4):
            data[k * 188 + 4 : (k + 1) * 188] = bytes(184)
    else:
        starts = [i for i in range(len(data) - 4) if data[i : i + 3] == b"\xff\xd8\xff"]
        data[starts[10] : starts[12] - 64] = bytes(starts[12] - 64 - starts[10])
    path.write_bytes(data)
    numbers, _, _, said = decode(path)
    assert len(numbers) == FRAMES and numbers[-8:] == list(range(22, 30)) and numbers[:10] == list(range(10)), (
        numbers,
        said,
    )
    assert suffix == "ts" or (numbers[10:12] == [9, 9] and "10..11 (0.40..0.44 s)" in said[0])


def test_packets_that_never_came_are_gaps_in_an_even_stream(make, tmp_path):
    """Of a transport stream whole packets are missing: its time stamps go on."""
    path = make("a.ts -c:v mpeg2video -g 1")
    data = path.read_bytes()
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    begins = [i for i, p in enumerate(packets) if p[1] & 0x40 and p[1] & 0x1F == 1 and p[2] == 0]
    cut = tmp_path / "cut.ts"
    cut.write_bytes(b"".join(packets[: begins[12]] + packets[begins[13] :]))
    numbers, seconds, _, said = decode(cut)
    assert numbers == [*range(12), 11, *range(13, 30)] and seconds[20] == pytest.approx(0.8) and "12..12" in said[0]


def test_left_out_frames_are_no_loss(make):
    """A recorder that writes a frame only where something moves: nothing is repeated, times are the container's."""
    numbers, seconds, _, said = decode(make(f"a.mkv {X264} -vsync vfr -vf setpts=(N+gte(N\\,15)*500)/25/TB"))
    assert numbers == list(range(FRAMES)) and seconds[15] == pytest.approx(20.6, abs=2e-3) and said == []


def test_a_truncated_file_says_both_lengths_and_so_do_its_labels(make, tmp_path):
    (tmp_path / "test").mkdir()
    path = make("a.avi -c:v mjpeg -q:v 2")
    path = path.rename(tmp_path / "test" / "b_0.avi")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    numbers, _, _, said = decode(path)
    assert numbers[:5] == list(range(5))
    assert f"of the 30 frames that its header promises could not be decoded; {len(numbers)} were" in said[-1]
    from common.readers.datasets import find

    np.savez(tmp_path / "labels.npz", b_0=np.zeros(FRAMES, np.uint8))
    data = find("folder", tmp_path, tmp_path / "labels.npz")
    with pytest.raises(
        UserError, match=f"30 entries.* {len(numbers)} frames.*promises 30 frames, {len(numbers)} could be decoded"
    ):
        evaluation.labels_of({"b_0": np.zeros(len(numbers))}, data)


def test_a_cached_video_is_warned_of_again(tmp_path, capsys, monkeypatch):
    """Another run, or another method with the same cache, shows the same numbers: it says the same about them."""
    video, cache = (
        open_video(save_frames(tmp_path / "v", np.repeat(pictures(1), 5, axis=0))),
        FrameCache(tmp_path / "cache"),
    )
    for _ in range(2):
        monkeypatch.setattr("common.readers.video._printed", set())
        cache.build([video], 1)
        assert "warning: video v: all its 5 frames are one and the same picture" in capsys.readouterr().out


def test_all_frames_alike_is_said_and_legal(tmp_path):
    save_frames(tmp_path / "v", np.repeat(pictures(1), 5, axis=0))
    numbers, _, _, said = decode(tmp_path / "v")
    assert len(numbers) == 5 and "one and the same picture" in said[0]
    save_frames(tmp_path / "w", pictures(5))
    assert decode(tmp_path / "w")[3] == []


# ------------------------------------------------------------------------------------------------ where times are shown


def test_times_are_kept_with_cached_frames_and_shown_everywhere(make, tmp_path):
    path = make(f"a.mp4 {X264} -vsync vfr -vf {UNEVEN}")
    video, cache = open_video(path), FrameCache(tmp_path / "cache")
    assert cache.build([video], 1)[1] == {}
    kept = cache.clock(video)
    assert np.allclose(kept.times, UNEVEN_TIMES, atol=2e-3) and kept.fps == pytest.approx(
        29 / UNEVEN_TIMES[-1], rel=1e-3
    )
    scores = np.r_[np.zeros(12), 5.0, np.zeros(17)]
    own_video.write("v", Decoder(video), video.clock(), scores, "none", "m", tmp_path, top=1)
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[13].startswith("12,4.080,") and rows[1].startswith("0,0.000,")
    assert (tmp_path / "ranking.csv").read_text().splitlines()[1].startswith("1,v,12,12,4.08,4.08,12,")
    page = content(tmp_path / "report.html")["videos"][0]
    assert page["times"][12] == 4.08 and page["fps"] == pytest.approx(kept.fps)
    made = read_container(tmp_path / "overlay.mp4")
    assert made.clock.times is None and made.claimed == FRAMES and made.clock.fps == pytest.approx(kept.fps, rel=1e-3)


def test_even_times_are_frame_by_rate(make, tmp_path):
    video, cache = (
        open_video(make(f"a.mkv {X264} -vf settb=1001/30000,setpts=N -r 30000/1001")),
        FrameCache(tmp_path / "cache"),
    )
    cache.build([video], 1)
    clock = cache.clock(video)
    assert clock.times is None and [clock.text(t, 3) for t in (0, 1, 29)] == ["0.000", "0.033", "0.968"]
    assert Clock().seconds(3) is None and Clock().text(3, 2) == ""


def test_a_page_and_a_ranking_of_footage_that_is_gone(tmp_path):
    """A camera's: there are times and no pictures."""
    clock = Clock(25.0, np.r_[0, 0.04, 30.0])
    scores = {"a": np.array([0.0, 0.1, 1.0])}
    found = ranking.write_ranking(scores, tmp_path, pictures=lambda _: (None, clock), top=1)
    assert found[0][3] == 2 and ",30.00,30.00," in (tmp_path / "ranking.csv").read_text()
    page.write(tmp_path / "r.html", "t", scores, scores, pictures=lambda _: (None, clock))
    assert content(tmp_path / "r.html")["videos"][0]["times"] == [0.0, 0.04, 30.0]


def test_overlay_of_uneven_frames_has_an_even_rate(tmp_path):
    frames, scores = pictures(10), np.zeros(10)
    plots.overlay(frames, None, scores, None, tmp_path / "o.mp4", Clock(9 / 20, np.linspace(0, 20, 10)), (0, 1), (0, 1))
    assert read_container(tmp_path / "o.mp4").clock.fps == pytest.approx(0.45, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- folders of frames


def folder_of(path, names, frames):
    path.mkdir(parents=True)
    for name, frame in zip(names, frames):
        cv2.imwrite(str(path / name), frame)
    return path


@pytest.mark.parametrize(
    "names,shown",
    [
        (["000.png", "001.png", "004.png", "005.png"], [0, 1, 1, 1, 2, 3]),  # two files were lost
        (["f_7.png", "f_8.png", "f_9.png", "f_11.png"], [0, 1, 2, 2, 3]),  # begins anywhere, not padded
        (["00.png", "05.png", "10.png", "20.png"], [0, 1, 2, 2, 3]),  # every fifth frame, one lost
        (["00.png", "05.png", "10.png", "15.png"], [0, 1, 2, 3]),  # every fifth frame
        (["cam2_0001.png", "cam2_0002.png", "cam2_0004.png"], [0, 1, 1, 2]),  # a number that is not the frame's
        (["1699999990123.png", "1699999990163.png", "1699999990205.png"], [0, 1, 2]),  # times of day
        (["x1a.png", "x1b.png", "x1c.png"], [0, 1, 2]),
        (["a.png", "b.png", "d.png"], [0, 1, 2]),
        (["a1_1.png", "a1_2.png", "a2_1.png"], [0, 1, 2]),
        (["0.25.png", "0.5.png", "0.75.png"], [0, 1, 2]),  # seconds
        (["7.png"], [0]),
    ],
)
def test_gaps_in_file_numbers(tmp_path, names, shown):
    numbers, _, _, said = decode(folder_of(tmp_path / "v", names, pictures(len(names))))
    assert numbers == shown
    lost = len(shown) - len(names)
    assert not lost or any(f"{lost} frames have no file" in x for x in said)
    assert open_video(tmp_path / "v").expected_frames() == len(shown)


@pytest.mark.parametrize(
    "names",
    [
        ["000.png", "000.jpg", "001.png", "001.jpg"],
        ["1.png", "001.png", "2.png"],
        ["000.png", "000_mask.png", "001.png", "001_mask.png"],
        ["a.png", "b.png", "a.jpg"],
    ],
)
def test_two_kinds_of_pictures_in_a_folder_are_refused(tmp_path, names):
    folder_of(tmp_path / "v", names, pictures(len(names)))
    folder_of(tmp_path / "w", ["0.png", "1.png"], pictures(2))
    with pytest.raises(UserError, match="holds a frame twice, .*: keep one kind"):
        decode(tmp_path / "v")
    usable, failed = FrameCache(tmp_path / "cache").build(list_videos(tmp_path), 1)
    assert [v.name for v in usable] == ["w"] and "twice" in failed["test/v"]


def test_renamed_frames_are_another_source(tmp_path):
    folder = save_frames(tmp_path / "v", pictures(3))
    video, cache = open_video(folder), FrameCache(tmp_path / "cache")
    cache.build([video], 1)
    (folder / "000.png").rename(folder / "t")
    (folder / "002.png").rename(folder / "000.png")
    (folder / "t").rename(folder / "002.png")  # the same names, sizes and newest time as before
    assert cache.info(open_video(folder)) is None
    os.utime(folder / "001.png", ns=(1, 2**61))
    first = open_video(folder).fingerprint()
    (folder / "000.png").rename(folder / "003.png")
    assert cache.info(open_video(folder)) is None and open_video(folder).fingerprint() != first


# ------------------------------------------------------------------------------------------------------------- pictures


def exif(data, orientation):
    """A JPEG with an EXIF block that says how to turn it."""
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + bytes([0, orientation, 0, 0]) + b"\0\0\0\0"
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


def test_pictures_of_every_kind(tmp_path):
    frame, wide = pictures(6)[5], pictures(6)[5].astype(np.uint16) * 257
    encode = lambda suffix, image, *flags: cv2.imencode(suffix, image, list(flags))[1].tobytes()
    jpg = encode(".jpg", frame, cv2.IMWRITE_JPEG_QUALITY, 95)
    made = {
        "8.png": encode(".png", frame),
        "16.png": encode(".png", wide),
        "16.tif": encode(".tif", wide),
        "grey16.png": encode(".png", wide[:, :, 1]),
        "float.tif": encode(".tif", (frame / 255).astype(np.float32)),
        "alpha.png": encode(".png", np.dstack([frame, frame[:, :, :1] // 2])),
        "alpha16.png": encode(".png", np.dstack([wide, wide[:, :, :1] // 2])),
        "p.jpg": jpg,
        "progressive.jpg": encode(".jpg", frame, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "trailer.jpg": jpg + bytes(range(256)) * 40,
        "thumbnail.jpg": jpg[:2] + b"\xff\xe2" + (len(jpg) + 2).to_bytes(2, "big") + jpg + jpg[2:],
        "jpeg called.png": jpg,
        "trailer.png": encode(".png", frame) + bytes(9000),
        "8.bmp": encode(".bmp", frame),
        "8.tif": encode(".tif", frame),
    }
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name)
        assert image is not None and image.dtype == np.uint8 and number(image) == 5, name
        assert image.ndim == 2 or (image.shape == frame.shape and np.abs(image.astype(int) - frame).mean() < 8), name
    for name in ("p.jpg", "thumbnail.jpg", "trailer.jpg", "8.png"):
        data = made[name] if name != "trailer.jpg" else jpg
        (tmp_path / "cut").write_bytes(data[: -len(jpg) // 3])
        assert read_image(tmp_path / "cut") is None, name
    turned = {3: frame[::-1, ::-1], 6: np.rot90(frame, -1), 8: np.rot90(frame)}
    for orientation, right in turned.items():
        (tmp_path / "e.jpg").write_bytes(exif(jpg, orientation))
        image = read_image(tmp_path / "e.jpg")
        assert image.shape == right.shape and np.abs(image.astype(int) - right).mean() < 8, orientation


def test_palette_and_cmyk(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="Pillow writes them")
    image = pillow.fromarray(np.ascontiguousarray(pictures(6)[5][:, :, ::-1]))
    image.convert("P", palette=pillow.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("palette.png", "cmyk.jpg"):
        found = read_image(tmp_path / name)
        assert found is not None and number(found) == 5 and found[40, 50, 2] > found[40, 50, 0] + 60, name


def test_sixteen_bits_are_said_and_kinds_may_be_mixed(tmp_path):
    frames = pictures(4)
    folder = folder_of(
        tmp_path / "v",
        ["0.png", "1.png", "2.png", "3.png"],
        [frames[0].astype(np.uint16) * 257, frames[1][:, :, 0], frames[2], frames[3]],
    )
    numbers, _, found, said = decode(folder)
    assert (
        numbers == [0, 1, 2, 3]
        and {f.shape for f in found} == {(48, 64, 3)}
        and any("uint16" in x and "high byte" in x for x in said)
    )


def test_addresses_and_names_with_colons(tmp_path, make, monkeypatch):
    path = make(f"a.mp4 {X264}")
    shutil.copy(path, tmp_path / "http:cam.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(Decoder(Video("x", "http:cam.mp4")))) == FRAMES
