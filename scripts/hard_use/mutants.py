"""Corrupted studies: a healthy image and mask, one of them changed by seeded random operations.

`mutants` writes one after the other, each into a folder with images/ and masks/, for any stage that reads images.
"""

import random
import re
import shutil
import string
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE_VOX = (8, 48, 48)
"""Slices, rows and columns of the healthy study."""
SPACING_XYZ_MM = (1.0, 1.0, 3.0)
FORMATS = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", "dicom")

Corruption = Callable[[random.Random, Path], str]
"""Changes a file, or a folder of DICOM files, and returns a description."""

NUMBERS = [
    "0", "-1", "1", "2", "3", "5", "7", "48", "65535", "99999", "2147483647", "-2147483648", "4294967296",
    "9223372036854775807", "1e-300", "1e-9", "0.001", "250", "1e6", "1e300", "nan", "inf", "-inf",
]  # fmt: skip
WORDS = [
    *NUMBERS, "", "?", "None", "LIST", "LOCAL", "True", "False", "MET_FLOAT", "MET_CHAR_ARRAY", "MET_LONG_LONG", "double",
    "block", "gzip", "bzip2", "ascii", "hex", "big", "none", "absent.raw", "../absent", "x" * 5000, "é€😀",
]  # fmt: skip
NAMES = [
    "10001_1 ", " 10001_1", "10001 1", "prostaat_één", "前列腺_1", "x" * 180, "10001_1.mha", "-rf", "--help", "=1+1_2",
    "10001_1;ls", "10001_'1'", '10001_"1"', "10001_$(id)", "10001_%s%n", "10001_{0}", "10001_,1", "10001_\t1", "10001_\n1",
    "CON_1", "a\u0301_1", "😀_1", "10001_#1", "10001_\\1", "10001_1.", "_", "..._1", "10001__1", "\u202e10001_1", "nan_1",
    "NA", "1e5_1",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One corrupted study."""

    number: int
    what: str
    """Format, which of the two files, and the operations."""
    image: Path
    """File, or folder of DICOM files, in images/."""
    mask: Path
    """File of the same stem in masks/."""


def mutants(folder: Path, *, seed: int, count: int) -> Iterator[Mutant]:
    """Yield corrupted studies, each in a folder of its own below `folder`; the same ones for a seed."""
    healthy = folder / "healthy"
    make_healthy(healthy)
    for number in range(count):
        yield _mutant(random.Random(f"{seed}/{number}"), number, folder / f"{number:04d}", healthy)


def make_healthy(folder: Path) -> None:
    """Write the healthy study in every format: images/1_1SUFFIX, and masks/1_1.nii.gz."""
    image, gland = healthy_arrays()
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for suffix in FORMATS[:-1]:
        sitk.WriteImage(_as_image(image), str(folder / f"images/1_1{suffix}"), suffix != ".mhd")
        sitk.WriteImage(_as_image(gland), str(folder / f"masks/1_1{suffix}"), suffix != ".mhd")
    _write_dicom(folder / "images/1_1dicom", image)


def healthy_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image, int16, and its ellipsoid as a mask, uint8."""
    z, y, x = np.ogrid[tuple(slice(-1, 1, complex(size)) for size in SHAPE_VOX)]
    gland = (z / 0.8) ** 2 + (y / 0.7) ** 2 + (x / 0.7) ** 2 < 1
    noise = np.random.default_rng(0).normal(100, 10, SHAPE_VOX)
    return (noise + 80 * gland).astype(np.int16), gland.astype(np.uint8)


def _as_image(array: np.ndarray, *, is_vector: bool = False) -> sitk.Image:
    image = sitk.GetImageFromArray(array, isVector=is_vector)
    if image.GetDimension() == 3:
        image.SetSpacing(SPACING_XYZ_MM)
        image.SetOrigin((-24.0, -24.0, -12.0))
    return image


def _write_dicom(folder: Path, array: np.ndarray) -> None:
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, pixels in enumerate(array):
        image = _as_image(pixels[np.newaxis])
        image.SetOrigin((-24.0, -24.0, 3.0 * index - 12))
        for key, text in {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.3.1"}.items():
            image.SetMetaData(key, text)
        writer.SetFileName(str(folder / f"{index:02d}.dcm"))
        writer.Execute(image)


def _mutant(rng: random.Random, number: int, folder: Path, healthy: Path) -> Mutant:
    suffix = rng.choice(FORMATS)
    corrupts_mask = suffix != "dicom" and rng.random() < 0.3
    mask_suffix = suffix if corrupts_mask else ".nii.gz"
    image = _copied(healthy / f"images/1_1{suffix}", folder / "images", stem="1_1", suffix=suffix)
    mask = _copied(healthy / f"masks/1_1{mask_suffix}", folder / "masks", stem="1_1", suffix=mask_suffix)
    corrupted = mask if corrupts_mask else image
    done = [rng.choice(CORRUPTIONS[suffix])(rng, corrupted)]
    if rng.random() < 0.25 and (corrupted.is_dir() if suffix == "dicom" else corrupted.is_file()):
        done.append(rng.choice(BYTES)(rng, corrupted))
    if rng.random() < 0.1:
        image, mask = _renamed(rng, image, mask, done)
    which = "mask" if corrupts_mask else "image"
    return Mutant(number=number, what=f"{suffix} {which}: {'; '.join(done)}", image=image, mask=mask)


def _copied(source: Path, folder: Path, *, stem: str, suffix: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        return Path(shutil.copytree(source, folder / stem))
    target = Path(shutil.copy(source, folder / f"{stem}{suffix}"))
    if suffix == ".mhd":
        shutil.copy(source.with_suffix(".raw"), folder / f"{stem}.raw")
    return target


def _renamed(rng: random.Random, image: Path, mask: Path, done: list[str]) -> tuple[Path, Path]:
    """Rename both files to an unusual name, if they still exist."""
    name = rng.choice(NAMES)
    done.append(f"named {name!r}")
    renamed = [path.with_name(name + path.name.removeprefix("1_1")) for path in (image, mask)]
    for before, after in zip((image, mask), renamed, strict=True):
        if before.exists():
            before.rename(after)
    return renamed[0], renamed[1]


# --- bytes


def truncate(rng: random.Random, path: Path) -> str:
    """Keep the first part of a file."""
    file = _file_of(rng, path)
    content = file.read_bytes()
    kept = rng.choice((0, 1, 100, len(content) // 2, max(0, len(content) - 1), rng.randrange(len(content) + 1)))
    file.write_bytes(content[:kept])
    return f"cut to {kept} of {len(content)} bytes"


def flip_bits(rng: random.Random, path: Path) -> str:
    """Flip bits, of the header or anywhere."""
    file = _file_of(rng, path)
    content = bytearray(file.read_bytes())
    end = min(len(content), rng.choice((64, 400, 1000, len(content))))
    count = rng.choice((1, 2, 8, 64)) if end else 0
    for _ in range(count):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{count} bits flipped in the first {end} bytes"


def overwrite(rng: random.Random, path: Path) -> str:
    """Overwrite, insert or remove a block, or append to the file."""
    file = _file_of(rng, path)
    content = file.read_bytes()
    start, size = rng.randrange(len(content) + 1), rng.choice((1, 16, 512, 5000))
    block = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), content[:size]))
    how = rng.choice(("overwritten", "inserted", "removed", "appended"))
    file.write_bytes(
        {
            "overwritten": content[:start] + block + content[start + size :],
            "inserted": content[:start] + block + content[start:],
            "removed": content[:start] + content[start + size :],
            "appended": content + block,
        }[how]
    )
    return f"{size} bytes {how} at {start}"


def replace_file(rng: random.Random, path: Path) -> str:
    """Replace a file by another format, noise, nothing, a folder or a pointer."""
    file = _file_of(rng, path)
    contents = {
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "noise": rng.randbytes(3000),
        "zeros": bytes(3000),
        "a web page": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "text of 3 MB": (string.printable * 30000).encode(),
    }
    what = rng.choice((*contents, "an empty folder", "a missing file"))
    file.unlink(missing_ok=True)
    if what in contents:
        file.write_bytes(contents[what])
    elif what == "an empty folder":
        file.mkdir()
    return f"replaced by {what}"


def _file_of(rng: random.Random, path: Path) -> Path:
    """Return the file itself, a file of the folder, or the voxel file of a .mhd."""
    if path.suffix == "" and path.name == "1_1":  # a series, which may have been removed by now
        path.mkdir(exist_ok=True)
        (path / "new.dcm").touch()
        return rng.choice(sorted(one for one in path.iterdir() if one.is_file()))
    raw = path.with_suffix(".raw")
    if path.suffix == ".mhd" and raw.is_file() and rng.random() < 0.4:
        return raw
    if not path.is_file():
        shutil.rmtree(path, ignore_errors=True)
        path.touch()
    return path


# --- headers


def change_text_header(rng: random.Random, path: Path) -> str:
    """Change, drop or repeat a line of a MetaImage or NRRD header."""
    content = _file_of(rng, path).read_bytes() if path.suffix != ".mhd" else _content(path)
    is_nrrd = path.suffix == ".nrrd"
    end = (
        content.find(b"\n\n")
        if is_nrrd
        else content.find(b"ElementDataFile") + content[content.find(b"ElementDataFile") :].find(b"\n")
    )
    lines = content[: max(end, 0)].decode("latin-1").split("\n")
    index = rng.randrange(len(lines))
    before = lines[index]
    how = rng.choice(("word", "word", "word", "all", "drop", "repeat"))
    if how == "drop":
        lines[index] = "#" if is_nrrd else "Comment = dropped"
    elif how == "repeat":
        lines.insert(index, before)
    else:
        lines[index] = _with_words(rng, before, all_of_them=how == "all")
    path.write_bytes("\n".join(lines).encode("utf-8", "replace") + content[max(end, 0) :])
    return f"header line {before[:40]!r} -> {how} {lines[index][:60]!r}"


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _with_words(rng: random.Random, line: str, *, all_of_them: bool) -> str:
    """Replace one value, or all, of a line by unusual ones; brackets and commas stay."""
    key, separator, values = re.fullmatch(r"([^=:]*)([=:]{0,2})(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
    found = list(re.finditer(r"[^\s,()]+", values))
    if not found:
        return f"{key}{separator} {rng.choice(WORDS)}"
    for match in reversed(found if all_of_them else [rng.choice(found)]):
        values = values[: match.start()] + rng.choice(WORDS) + values[match.end() :]
    return key + separator + values


NIFTI_FIELDS = {
    "sizeof_hdr": (0, "<i"), "dim[0]": (40, "<h"), "dim[1]": (42, "<h"), "dim[2]": (44, "<h"), "dim[3]": (46, "<h"),
    "dim[4]": (48, "<h"), "dim[5]": (50, "<h"), "intent_code": (68, "<h"), "datatype": (70, "<h"), "bitpix": (72, "<h"),
    "pixdim[0]": (76, "<f"), "pixdim[1]": (80, "<f"), "pixdim[2]": (84, "<f"), "pixdim[3]": (88, "<f"),
    "vox_offset": (108, "<f"), "scl_slope": (112, "<f"), "scl_inter": (116, "<f"), "xyzt_units": (123, "<B"),
    "qform_code": (252, "<h"), "sform_code": (254, "<h"), "quatern_b": (256, "<f"), "quatern_c": (260, "<f"),
    "qoffset_x": (268, "<f"), "srow_x[0]": (280, "<f"), "srow_y[1]": (300, "<f"), "srow_z[2]": (320, "<f"),
    "srow_z[3]": (324, "<f"), "magic": (344, "<i"), "extension": (348, "<i"),
}  # fmt: skip
NIFTI_VALUES = {
    "<i": (0, 1, 348, 540, -1, 2**31 - 1),
    "<h": (0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1792, 2048, 2304, 5, 32767, -1, -32768),
    "<B": (0, 1, 2, 3, 255),
    "<f": (0.0, -1.0, 1e-30, 1e-3, 0.5, 100.0, 352.0, 1e5, 1e30, float("nan"), float("inf"), float("-inf")),
}


def change_nifti_header(rng: random.Random, path: Path) -> str:
    """Set fields of a NIfTI header to unusual values; the file is decompressed and compressed again."""
    import gzip

    content = _content(path)
    is_gzip = content[:2] == b"\x1f\x8b"
    try:
        plain = bytearray(gzip.decompress(content) if is_gzip else content)
    except (OSError, EOFError):
        return "nothing (no NIfTI file any more)"
    said = []
    for name in rng.sample(list(NIFTI_FIELDS), rng.choice((1, 1, 2, 4))):
        offset, code = NIFTI_FIELDS[name]
        value = rng.choice(NIFTI_VALUES[code])
        if len(plain) >= offset + struct.calcsize(code):
            struct.pack_into(code, plain, offset, value)
        said.append(f"{name}={value}")
    path.write_bytes(gzip.compress(bytes(plain), 1) if is_gzip else plain)
    return ", ".join(said)


DICOM_TAGS = {
    "Rows": (0x28, 0x10), "Columns": (0x28, 0x11), "Bits Allocated": (0x28, 0x100), "Bits Stored": (0x28, 0x101),
    "High Bit": (0x28, 0x102), "Pixel Representation": (0x28, 0x103), "Samples per Pixel": (0x28, 2),
    "Photometric Interpretation": (0x28, 4), "Pixel Spacing": (0x28, 0x30), "Rescale Slope": (0x28, 0x1053),
    "Rescale Intercept": (0x28, 0x1052), "Image Position": (0x20, 0x32), "Image Orientation": (0x20, 0x37),
    "Transfer Syntax": (0x2, 0x10), "Series UID": (0x20, 0xE), "SOP Class": (0x8, 0x16), "Pixel Data": (0x7FE0, 0x10),
}  # fmt: skip


def change_dicom_tag(rng: random.Random, path: Path) -> str:
    """Overwrite the value or the length of an element of one DICOM file, or of all."""
    name = rng.choice(list(DICOM_TAGS))
    tag = struct.pack("<HH", *DICOM_TAGS[name])
    files = sorted(one for one in path.iterdir() if one.is_file())
    chosen = files if rng.random() < 0.5 else files[:1]
    what = rng.choice(("value", "value", "length"))
    text = rng.choice(NUMBERS).encode()
    number = rng.choice((0, 1, 2, 3, 8, 12, 17, 32, 255, 4096, 32767, 65535))
    for file in chosen:
        content = bytearray(file.read_bytes())
        at = content.find(tag)
        if at < 0 or at + 12 > len(content):
            continue
        vr = bytes(content[at + 4 : at + 6])
        if what == "length" or vr in (b"OW", b"OB"):
            content[at + 6 : at + 8] = struct.pack("<H", number)
        elif vr == b"US":
            content[at + 8 : at + 10] = struct.pack("<H", number)
        else:
            (length,) = struct.unpack_from("<H", content, at + 6)
            content[at + 8 : at + 8 + length] = text.ljust(length)[:length]
        file.write_bytes(content)
    return f"{name}: {what} {number if what == 'length' else text.decode()}/{number} in {len(chosen)} files"


def disturb_series(rng: random.Random, path: Path) -> str:
    """Remove, duplicate, move or add files of a series."""
    files = sorted(one for one in path.iterdir() if one.is_file())
    how = rng.choice(
        ("remove one", "keep one", "keep two", "remove all", "double one", "add text", "add folder", "nest")
    )
    if how in ("remove one", "double one") and files:
        one = rng.choice(files)
        one.unlink() if how == "remove one" else shutil.copy(one, path / "copy.dcm")
    elif how.startswith("keep") or how == "remove all":
        for one in files[{"keep one": 1, "keep two": 2, "remove all": 0}[how] :]:
            one.unlink()
    elif how == "add text":
        (path / "notes.txt").write_text("seen by a radiologist")
    else:
        (path / "more").mkdir(exist_ok=True)
        for one in files if how == "nest" else []:
            one.rename(path / "more" / one.name)
    return f"series: {how}"


# --- voxels

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "complex64")
SHAPES = (
    (1, 1, 1),
    (1, 48, 48),
    (2, 48, 48),
    (3, 1, 1),
    (3, 3, 3),
    (3, 2, 2000),
    (3, 9000, 2),
    (400, 4, 4),
    (48, 48),
    (2, 8, 48, 48),
)


def change_voxels(rng: random.Random, path: Path) -> str:
    """Change the voxels: type, shape, and values that are not valid intensities or labels."""
    is_mask = path.parent.name == "masks"
    array = healthy_arrays()[is_mask].astype(np.float64)
    said = []
    if rng.random() < 0.4:
        shape = rng.choice(SHAPES)
        array, said = np.resize(array, shape), [f"shape {shape}"]
    value = rng.choice(
        (None, np.nan, np.inf, -np.inf, 0, 0.5, -1, 7, 255, 65535, 1e9, 3e38, 1e300, "constant", "noise", "inverted")
    )
    array, dtype = _corrupted(rng, array, value), rng.choice(DTYPES)
    said += [] if value is None else [f"values {value}"]
    with np.errstate(all="ignore"):
        typed = array.astype(dtype)
    is_vector = rng.random() < 0.1 and array.ndim == 3 and dtype != "complex64"
    voxels = np.stack([typed] * 3, axis=-1) if is_vector else typed
    image = _as_image(voxels, is_vector=is_vector)
    if image.GetDimension() == 3 and rng.random() < 0.3:
        image.SetSpacing(rng.choices((1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e9), k=3))
        said.append(f"spacing {image.GetSpacing()}")
    if image.GetDimension() == 3 and rng.random() < 0.2:
        image.SetDirection(np.random.default_rng(rng.randrange(1000)).normal(size=(3, 3)).ravel().tolist())
        said.append("random directions")
    try:
        path.unlink(missing_ok=True)
        sitk.WriteImage(image, str(path), rng.random() < 0.5)
    except (RuntimeError, OSError) as error:
        return f"nothing ({' '.join(str(error).split())[-60:]})"
    return ", ".join(["vectors" if is_vector else "", dtype, *said])


def _corrupted(rng: random.Random, array: np.ndarray, value: object) -> np.ndarray:
    """Return the array with one voxel, a slice or all of them changed."""
    if value == "constant":
        return np.full_like(array, 3)
    if value == "noise":
        return np.random.default_rng(rng.randrange(1000)).integers(-3000, 3000, array.shape).astype(np.float64)
    if value == "inverted":
        return array.max() - array
    if value is not None:
        array = array.copy()
        array.flat[: rng.choice((1, array.size // 8, array.size))] = value
    return array


def write_bomb(rng: random.Random, path: Path) -> str:
    """Write a small file whose header declares far more voxels than it contains."""
    sides = rng.choice(
        (
            (30000, 30000, 1000),
            (2000, 2000, 2000),
            (700, 700, 700),
            (4000, 4000, 16),
            (600, 600, 600),
            (1000, 1000, 100),
        )
    )
    content = _content(path)
    if path.suffix == ".nrrd":
        content = re.sub(rb"sizes: [^\n]*", b"sizes: %d %d %d" % sides, content)
    elif path.suffix in (".mha", ".mhd"):
        content = re.sub(rb"DimSize = [^\n]*", b"DimSize = %d %d %d" % sides, content)
    else:
        import gzip

        with_header = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        plain = bytearray(with_header)
        struct.pack_into("<3h", plain, 42, *sides)
        content = gzip.compress(bytes(plain), 1) if content[:2] == b"\x1f\x8b" else bytes(plain)
    path.write_bytes(content)
    return f"declares {' x '.join(map(str, sides))} voxels"


BYTES = (truncate, flip_bits, overwrite, replace_file)
TEXT = (*BYTES, change_text_header, change_text_header, change_text_header, change_voxels, change_voxels, write_bomb)
NIFTI = (
    *BYTES,
    change_nifti_header,
    change_nifti_header,
    change_nifti_header,
    change_voxels,
    change_voxels,
    write_bomb,
)
CORRUPTIONS: dict[str, tuple[Corruption, ...]] = {
    ".mha": TEXT,
    ".mhd": TEXT,
    ".nrrd": TEXT,
    ".nii": NIFTI,
    ".nii.gz": NIFTI,
    "dicom": (*BYTES, change_dicom_tag, change_dicom_tag, change_dicom_tag, disturb_series, disturb_series),
}
"""Operations for each format; one that is listed twice is chosen twice as often."""
