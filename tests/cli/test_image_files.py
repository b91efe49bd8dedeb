"""The images that a command line names, and the names that they get."""

from mgd_det.cli.image_files import find_images


def test_images_of_different_folders_never_share_a_name(tmp_path, monkeypatch):
    for folder in ("a", "here/a", "here/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    monkeypatch.chdir(tmp_path / "here")
    for paths, names in (
        (["b"], ["1.png"]),
        (["a", "b"], ["a/1.png", "b/1.png"]),
        (["../a", "a"], ["a/1.png", "here/a/1.png"]),
        (["../a/1.png", str(tmp_path / "here" / "a" / "1.png")], ["a/1.png", "here/a/1.png"]),
    ):
        images = find_images(paths, "IMAGE")
        assert [image.name for image in images] == names
        assert all((tmp_path / "here" / image.path).exists() for image in images)
