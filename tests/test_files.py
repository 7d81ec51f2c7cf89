"""Files as people have them: pictures, arrays and archives lose nothing on the way in, and take little memory."""

import io
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae import load_dataset
from pyro_vae.data import read

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 6, 4, 3), dtype=np.uint8)  # (N, H, W, C)


def pictures(folder, arrays, ending="png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}.{ending}", **options)
    return folder


def in_order(data):
    """(N, C, H, W) of all splits, in the order of the files."""
    parts = [data.train, data.valid, data.test]
    ids = np.concatenate([part.ids for part in parts])
    return torch.cat([part.x for part in parts])[np.argsort(ids)]


def test_what_looks_alike_is_alike(tmp_path):
    """Colours under full transparency are nobody's; black on nothing is black on white, in RGBA, LA and palettes."""
    drawn = RNG.random((12, 8, 8)) < 0.4
    expected = torch.from_numpy(~drawn).float()[:, None]
    for hidden in (0, 200):
        pixels = np.full((12, 8, 8, 4), hidden, np.uint8)
        pixels[..., 3] = 0
        pixels[drawn] = (0, 0, 0, 255)
        of_colours = pictures(tmp_path / f"rgba{hidden}", pixels)
        of_greys = tmp_path / f"la{hidden}"
        of_palette = tmp_path / f"p{hidden}"
        for folder, mode in ((of_greys, "LA"), (of_palette, "P")):
            folder.mkdir()
            for i, array in enumerate(pixels):
                image = Image.fromarray(array)
                if mode == "LA":
                    image.convert("LA").save(folder / f"{i:02d}.png")
                else:
                    indexed = Image.fromarray(np.where(array[..., 3] > 0, 1, 0).astype(np.uint8), "P")
                    indexed.putpalette([hidden, hidden, hidden, 0, 0, 0])
                    indexed.save(folder / f"{i:02d}.png", transparency=0)
        for folder in (of_colours, of_greys, of_palette):
            data = load_dataset(folder)
            torch.testing.assert_close(in_order(data), expected)
            assert "transparent pixels over white" in data.description
    half = np.zeros((12, 8, 8, 4), np.uint8)
    half[..., 3] = 51  # a fifth of black over white
    torch.testing.assert_close(
        in_order(load_dataset(pictures(tmp_path / "half", half))), torch.full((12, 1, 8, 8), 0.8), atol=0.005, rtol=0
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_that_were_turned(orientation, tmp_path):
    """Stored as EXIF's orientation says, the picture is the same."""
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = [np.ascontiguousarray(turned(array)) for array in PIXELS]
    data = load_dataset(pictures(tmp_path / "im", stored, exif=exif))
    torch.testing.assert_close(in_order(data), torch.from_numpy(PIXELS).movedim(-1, 1) / 255)
    assert ("turned as EXIF tells" in data.description) == (orientation != 1)


def test_which_array_and_where_its_channels_are(tmp_path):
    """What is found out can be told: also of the very pictures that look otherwise."""
    wide = RNG.random((12, 6, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "two.npz", x=wide[..., 0], other=wide)
    named = load_dataset(tmp_path / "two.npz", array="other", channels="last")
    assert torch.equal(in_order(named), torch.from_numpy(wide).movedim(-1, 1)) and "last" not in named.description
    first = load_dataset(tmp_path / "two.npz", array="other", channels="first")
    assert torch.equal(in_order(first), torch.from_numpy(wide))
    assert load_dataset(**named.train.source).event_shape == (3, 6, 5)
    small = RNG.random((12, 4, 4, 2))
    assert load_dataset(small, channels="last").event_shape == (2, 4, 4)
    for options, message in (
        ({"array": "z"}, r"expected array= \(--data.array\) as one of \['x', 'other'\]"),
        ({"channels": "middle"}, "expected channels= .* to be 'first' or 'last', got 'middle'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / "two.npz", **options)
    with pytest.raises(ValueError, match="expected a .npz file for array="):
        load_dataset("digits", array="x")


def test_pictures_of_16_bits(tmp_path):
    deep = RNG.integers(0, 65536, (12, 6, 5), dtype=np.uint16)
    folder = tmp_path / "im"
    folder.mkdir()
    for i, array in enumerate(deep):
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    np.save(tmp_path / "deep.npy", deep)
    np.save(tmp_path / "deep_last.npy", deep[..., None])
    np.savez(tmp_path / "deep.npz", x=deep)
    expected = torch.from_numpy(deep.astype(np.float64) / 65535).float()[:, None]
    for path in (folder, *(tmp_path / name for name in ("deep.npy", "deep_last.npy", "deep.npz"))):
        data = load_dataset(path)
        torch.testing.assert_close(in_order(data), expected, rtol=1e-6, atol=0)
        assert "intensities x/65535" in data.description
    np.save(tmp_path / "table.npy", deep[:, 0])  # counts, and no picture
    assert load_dataset(tmp_path / "table.npy").description.startswith("12 rows of 5 columns")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_last_are_moved_and_told(dtype, channels, tmp_path):
    values = RNG.integers(0, 256, (20, 8, 5, channels), dtype=np.uint8)
    array = values if dtype == np.uint8 else (values / 255).astype(dtype)
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", np.moveaxis(array, -1, 1))
    last, first = load_dataset(tmp_path / "last.npy"), load_dataset(tmp_path / "first.npy")
    assert last.event_shape == (channels, 8, 5) and torch.equal(last.train.x, first.train.x)
    assert "channels last in the file" in last.description and "channels last" not in first.description


def test_pictures_of_several_sizes_are_resized_on_demand(tmp_path):
    folder = pictures(tmp_path / "im", [np.full((6, 4, 3), 10, np.uint8)] * 6)
    for i in range(6):
        Image.new("RGB", (9 + i, 5), (10, 10, 10)).save(folder / f"other{i}.png")
    with pytest.raises(ValueError, match=r"4 x 6 pixels .* size= \(--data.size 32, or 32x24"):
        load_dataset(folder)
    for size, shape in ((5, (1, 5, 5)), ("7x3", (1, 7, 3)), ((7, 3), (1, 7, 3))):
        data = load_dataset(folder, size=size)
        assert data.event_shape == shape and "resized to" in data.description
        torch.testing.assert_close(data.train.x, torch.full_like(data.train.x, 10 / 255))
        assert load_dataset(**data.train.source).event_shape == shape
    for wrong in ("7y3", (1, 2, 3), 0, "0x4", -3):
        with pytest.raises(ValueError, match="expected size as 32, 32x24"):
            load_dataset(folder, size=wrong)
    with pytest.raises(ValueError, match="a folder of images for size="):
        load_dataset("digits", size=4)


def test_what_else_lies_in_a_folder_of_pictures(tmp_path):
    """Other files are told, folders of splits are no classes, and one folder around the classes is none either."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "im" / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (5, 5), (10 * i, 10, 10)).save(folder / f"{i}.{'png' if i else 'jfif'}", format="PNG")
            (folder / "note.txt").write_text("none")
            (folder / "scan.jp2").write_bytes(b"jp2")
    splits = r"expected folders of classes in .*, got those of splits, \[.*'test', 'train'\]"
    with pytest.raises(ValueError, match=splits):
        load_dataset(tmp_path / "im")
    shutil.copytree(tmp_path / "im" / "test", tmp_path / "im" / "other")
    with pytest.raises(ValueError, match=splits):
        load_dataset(tmp_path / "im")
    data = load_dataset(tmp_path / "im" / "train")
    assert data.classes == ("cat", "dog") and sum(map(len, (data.train, data.valid, data.test))) == 12
    assert "4 files of other kinds not read (.jp2, .txt)" in data.description
    (tmp_path / "around").mkdir()
    (tmp_path / "im" / "train").rename(tmp_path / "around" / "train")
    around = load_dataset(tmp_path / "around")
    assert around.classes == ("cat", "dog") and around.train.labels.unique().tolist() == [0, 1]
    assert all(name.startswith("train/") for name in around.train.ids)
    for part in ("train", "test"):
        pictures(tmp_path / "flat" / part, [np.full((5, 5, 3), 9, np.uint8)] * 6)
    with pytest.raises(ValueError, match=splits):
        load_dataset(tmp_path / "flat")


def test_arrays_have_the_bits_that_they_have(tmp_path):
    """Whatever those of the training were; true and false are no intensities."""
    grey = np.arange(12 * 36, dtype=np.uint8).reshape(12, 6, 6)
    for schema in (load_dataset(grey).schema, load_dataset(grey.astype(np.uint16) * 257).schema):
        torch.testing.assert_close(read(schema, grey).x[:, 0], torch.from_numpy(grey) / 255)
        with pytest.raises(ValueError, match="expected intensities from 0 to .*, got 0 to 1"):
            read(schema, grey > 100)
    near = 1.7e9 + RNG.integers(0, 3, (20, 4, 4))
    with pytest.raises(
        ValueError, match=r"float32 tells apart in array, which has some from 1700000000 to 1700000002, which"
    ):
        load_dataset(near)
    pictures(tmp_path / "deep", [np.full((6, 4), 9000, np.uint16)] * 3)
    colours = load_dataset(pictures(tmp_path / "im", list(PIXELS))).schema
    deep = read(colours, tmp_path / "deep").x
    torch.testing.assert_close(deep, torch.full((3, 3, 6, 4), 9000 / 65535))
    with pytest.raises(ValueError, match=r"size= \(--data.size 6x4\) resizes them"):
        read(colours, pictures(tmp_path / "large", [np.full((8, 8, 3), 9, np.uint8)]))


def test_colours_of_16_bits_are_told(tmp_path):
    folder = pictures(tmp_path / "im", [np.full((5, 5, 3), 40 * i, np.uint8) for i in range(6)])
    rows = b"".join(b"\0" + np.full((5, 3), 1699, ">u2").tobytes() for _ in range(5))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 5, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    for i in range(6):
        (folder / f"deep{i}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
        )
    data = load_dataset(folder)
    assert "colours of 16 bits cut to 8" in data.description and float(data.train.x.max()) <= 1


def test_animations_tell_their_first_frame(tmp_path):
    folder = tmp_path / "im"
    folder.mkdir()
    for i in range(12):
        frames = [Image.new("L", (4, 4), 20 * i), Image.new("L", (4, 4), 255)]
        frames[0].save(folder / f"{i:02d}.gif", save_all=True, append_images=frames[1:])
    data = load_dataset(folder)
    torch.testing.assert_close(in_order(data)[:, 0, 0, 0], torch.arange(12) * 20 / 255)
    assert "the first frame of animations" in data.description


def test_no_picture_runs_a_program(tmp_path, monkeypatch):
    """A PostScript file that is called .png would go to Ghostscript."""
    mark = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "gs"
    script.write_text(f"#!/bin/sh\necho run >> {mark}\necho 9.55\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    folder = pictures(tmp_path / "im", PIXELS)
    (folder / "99.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="expected an image in .*99.png, got a truncated, foreign or too large file"):
        load_dataset(folder)
    assert not mark.exists()


def bomb(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 1) * min(height, 1000)), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [11_000, 20_000])
def test_pictures_that_are_too_large_to_be_any(side, tmp_path):
    folder = pictures(tmp_path / "im", PIXELS)
    bomb(folder / "99.png", side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match="expected an image in .*99.png, got a truncated, foreign or too large file"
        ):
            load_dataset(folder)


# ------------------------------------------------------------ arrays and archives


@pytest.mark.parametrize(
    ("names", "data", "labels", "unused"),
    [
        (("x", "labels"), "x", "labels", ""),
        (("X", "y"), "X", "y", ""),
        (("x_train", "y_train", "x_test", "y_test"), "x_train", "y_train", "x_test, y_test"),
        (("data", "target", "frame"), "data", "target", "frame"),
        (("values",), "values", None, ""),
        (("x", "weights"), "x", None, "weights"),
    ],
)
def test_names_of_arrays(names, data, labels, unused, tmp_path):
    table, codes = RNG.random((30, 3)), RNG.integers(0, 2, 30)
    arrays = {name: table if name == data else codes for name in names}
    np.savez(tmp_path / "a.npz", **arrays)
    found = load_dataset(tmp_path / "a.npz")
    assert (found.train.labels is not None) == (labels is not None)
    rows = found.restore(found.train.x.double())
    torch.testing.assert_close(rows, torch.from_numpy(table)[found.train.ids], atol=1e-6, rtol=0)
    assert (f", {unused} not used" in found.description) == bool(unused) and ("not used" in found.description) == bool(
        unused
    )


def test_an_array_that_is_not_used_is_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=RNG.random((30, 3)), objects=np.array([{"a": 1}], dtype=object))
    assert "objects not used" in load_dataset(tmp_path / "a.npz").description


def announce(shape, dtype="<f4"):
    """The head of a file in NumPy's format, without the array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_what_is_announced_to_be_large_is_asked_for(tmp_path):
    (tmp_path / "a.npy").write_bytes(announce((10**9, 3)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", announce((10**9, 3)))
    torch.save(torch.zeros(1, 3).expand(10**8, 3), tmp_path / "a.pt")
    for name, message in (("a.npy", "at most 2 GB"), ("a.npz", "at most 2 GB"), ("a.pt", "that repeat fewer")):
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / name)
    with pytest.raises(ValueError, match="truncated or broken"):
        load_dataset(tmp_path / "a.npy", max_gb=100)
    np.save(tmp_path / "b.npy", RNG.random((100, 3)))
    with pytest.raises(ValueError, match=r"at most 1e-06 GB in .*: allow more with max_gb= \(--data.max_gb\)"):
        load_dataset(tmp_path / "b.npy", max_gb=1e-6)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="expected max_gb > 0"):
            load_dataset(tmp_path / "b.npy", max_gb=wrong)


def test_tensors_without_values_are_refused_in_one_line(tmp_path, recwarn):
    torch.save(torch.empty(12, 3, device="meta"), tmp_path / "meta.pt")
    torch.save(torch.eye(12).to_sparse(), tmp_path / "sparse.pt")
    for name, message in (("meta", "got a tensor on the meta device"), ("sparse", "a dense real tensor")):
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / f"{name}.pt")
    assert not recwarn.list


MEMORY = """
import resource, sys
import numpy as np, torch, PIL.Image, scipy, pandas
from pyro_vae import load_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = load_dataset(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
elements = sum(split.x.numel() for split in (data.train, data.valid, data.test))
print((after - before) * 1024, 4 * elements)
"""


@pytest.mark.parametrize("kind", ["float32 table", "uint8 pictures", "float64 table"])
def test_loading_takes_a_few_times_the_array(kind, tmp_path):
    """At most four times the array in float32, and 200 MB."""
    path = tmp_path / "a.npy"
    if kind == "uint8 pictures":
        np.save(path, RNG.integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8))
    else:
        np.save(path, RNG.standard_normal((1_000_000, 40), dtype=np.float32).astype(kind.split()[0]))
    found = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    taken, size = map(int, found.stdout.split())
    assert taken <= 4 * size + 200e6, (taken / 1e6, size / 1e6)
