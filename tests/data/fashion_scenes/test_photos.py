import gzip
import shutil
import struct

import numpy as np
import pytest

from mgd_det.data.fashion_scenes import photos
from mgd_det.data.fashion_scenes.photos import DEBIAN_FOLDER, find_photo_folder, read_photos
from mgd_det.errors import UserError

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def write_idx(path, array):
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data, compresslevel=1))


def write_photo_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for number, (split, (image_name, label_name)) in enumerate(FILES.items()):
        rng = np.random.default_rng(number)
        images = rng.integers(0, 256, (7 + number, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, 7 + number, dtype=np.uint8)
        write_idx(folder / image_name, images)
        write_idx(folder / label_name, labels)
        arrays[split] = (images, labels)
    return arrays


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without photos, where every download fails; returns its log."""
    log = []

    def no_download(root, download):
        log.append("download")
        raise RuntimeError("no route to host")

    monkeypatch.setattr(photos, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(photos, "FashionMNIST", no_download)
    return log


@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(tmp_path, split):
    images, labels = write_photo_folder(tmp_path)[split]
    photos = read_photos(find_photo_folder(tmp_path), split)
    assert photos.images.dtype == np.uint8
    np.testing.assert_array_equal(photos.images, images)
    np.testing.assert_array_equal(photos.labels, labels)


def test_reads_uncompressed_files(tmp_path):
    images, _ = write_photo_folder(tmp_path)["test"]
    for path in list(tmp_path.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_photos(find_photo_folder(tmp_path), "test").images, images)


def test_real_photos():
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip(f"the Debian package dataset-fashion-mnist is not installed ({DEBIAN_FOLDER})")
    for split, count in (("train", 60000), ("test", 10000)):
        photos = read_photos(DEBIAN_FOLDER, split)
        assert photos.images.shape == (count, 28, 28)
        np.testing.assert_array_equal(np.bincount(photos.labels), [count // 10] * 10)


def test_explicit_folder_without_files_names_them(tmp_path, machine):
    write_photo_folder(tmp_path / "debian")  # must not be taken instead
    write_photo_folder(tmp_path / "mine")
    (tmp_path / "mine" / FILES["test"][1]).unlink()
    with pytest.raises(UserError, match=f"mine.*{FILES['test'][1]}"):
        find_photo_folder(tmp_path / "mine")


@pytest.mark.parametrize("damage", ["truncated gzip", "not gzip", "flipped byte", "short data", "wrong magic"])
def test_damaged_file_is_named(tmp_path, damage):
    write_photo_folder(tmp_path)
    path = tmp_path / FILES["train"][0]
    data = path.read_bytes()
    plain = gzip.decompress(data)
    path.write_bytes(
        {
            "truncated gzip": data[: len(data) // 2],
            "not gzip": b"<html>404</html>",
            "flipped byte": data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
            "short data": gzip.compress(plain[:-5]),
            "wrong magic": gzip.compress(b"\xff" * 4 + plain[4:]),
        }[damage]
    )
    with pytest.raises(UserError, match=FILES["train"][0]):
        read_photos(tmp_path, "train")


def test_labels_of_another_set_are_refused(tmp_path):
    write_photo_folder(tmp_path)
    shutil.copy(tmp_path / FILES["test"][1], tmp_path / FILES["train"][1])
    with pytest.raises(UserError, match=FILES["train"][1]):
        read_photos(tmp_path, "train")


def test_debian_folder_comes_before_the_download(tmp_path, machine):
    write_photo_folder(tmp_path / "debian")
    write_photo_folder(tmp_path / "root" / "FashionMNIST" / "raw")
    assert find_photo_folder(download_root=tmp_path / "root") == tmp_path / "debian"


def test_earlier_download_is_used_again(tmp_path, machine):
    write_photo_folder(tmp_path / "root" / "FashionMNIST" / "raw")
    found = find_photo_folder(download_root=tmp_path / "root")
    assert found == tmp_path / "root" / "FashionMNIST" / "raw"
    assert machine == []


def test_download(tmp_path, machine, monkeypatch):
    def download(root, download):
        machine.append("download")
        write_photo_folder(tmp_path / "FashionMNIST" / "raw")

    monkeypatch.setattr(photos, "FashionMNIST", download)
    assert find_photo_folder(download_root=tmp_path) == tmp_path / "FashionMNIST" / "raw"
    assert machine == ["download"]


def test_no_way_to_get_photos_says_what_to_do(tmp_path, machine):
    with pytest.raises(UserError) as error:
        find_photo_folder(download_root=tmp_path)
    for part in ("no route to host", "dataset-fashion-mnist", "--photos"):
        assert part in str(error.value)
    assert machine == ["download"]
