"""Folders of images: the evaluation transform of torchvision and timm, and what can go wrong with files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from bnfold.data import InputSpec, open_data
from bnfold.data.images import ImageOptions, Pipeline, resolve
from bnfold.errors import DataError, UsageError

F32 = np.dtype(np.float32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def spec(*shape, dtype=F32) -> list[InputSpec]:
    return [InputSpec("x", np.dtype(dtype), shape or ("n", 3, 32, 32))]


def pipeline(inputs=None, **options) -> Pipeline:
    return resolve((inputs or spec())[0], ImageOptions(**options))[0]


def refused(text, call):
    with pytest.raises(DataError, match=re.escape(text)):
        for _ in call():
            pass


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_usual_steps(picture):
    made = pipeline(resize=36, mean=MEAN, std=STD)
    small = np.asarray(Image.fromarray(PIXELS).resize((54, 36), Image.Resampling.BILINEAR))[2:34, 11:43]
    expected = (small.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_array_equal(made(picture), expected.transpose(2, 0, 1))
    assert str(made) == (
        "RGB -> resize to shorter side 36 (bilinear) -> centre crop 32x32 -> scale 1/255 -> mean 0.485, 0.456, 0.406 "
        "-> std 0.229, 0.224, 0.225 -> float32 CHW"
    )


@pytest.mark.parametrize(("height", "width", "cropped"), [(32, 32, False), (20, 32, False), (33, 32, True)])
def test_small_images_are_not_cropped_unasked(height, width, cropped, tmp_path):
    image = Image.fromarray(PIXELS).resize((width, height))
    image.save(tmp_path / "a.png")
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(np.float32) / 255
    assert np.array_equal(pipeline()(tmp_path / "a.png"), whole) != cropped
    for asked in ({"crop": True}, {"crop_pct": 0.875}, {"resize": 36}):
        assert not np.array_equal(pipeline(**asked)(tmp_path / "a.png"), whole)


@pytest.mark.parametrize(
    ("height", "width", "options"),
    [
        (40, 60, {"resize": 36}),
        (61, 47, {"resize": 37, "interpolation": "bicubic"}),
        (33, 100, {"crop_pct": 0.875}),
        (20, 25, {"resize": 0}),  # padded
        (25, 90, {"resize": 0}),
        (45, 52, {"resize": (32, 32)}),
    ],
)
def test_torchvision(tmp_path, height, width, options):
    """Against the transforms themselves, where they are installed."""
    from vision import package

    T = package("torchvision.transforms")
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    resize = options.get("resize", int(32 / options.get("crop_pct", 1)))
    how = T.InterpolationMode(options.get("interpolation", "bilinear"))
    steps = [T.Resize(resize, how)] if resize else []
    expected = T.Compose([*steps, T.CenterCrop(32), T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    np.testing.assert_allclose(pipeline(mean=MEAN, std=STD, **options)(tmp_path / "a.png"), expected.numpy(), rtol=0, atol=1e-6)


def test_the_aspect_is_kept_for_a_target_that_is_not_square(picture):
    made = pipeline(spec("n", 3, 32, 24), crop_pct=0.8)
    small = np.asarray(Image.fromarray(PIXELS).resize((60, 40), Image.Resampling.BILINEAR))[4:36, 18:42]
    np.testing.assert_array_equal(made(picture), small.transpose(2, 0, 1).astype(np.float32) / 255)
    assert "cover 40x30 (bilinear) -> centre crop 32x24" in str(made)


def test_no_crop_and_no_resize(picture):
    squashed = np.asarray(Image.fromarray(PIXELS).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pipeline(crop=False)(picture), squashed.astype(np.float32) / 255)
    np.testing.assert_array_equal(pipeline(stretch=True, resize=36, crop_pct=0.9)(picture), pipeline(crop=False)(picture))
    np.testing.assert_array_equal(pipeline(resize=0)(picture), PIXELS[4:36, 14:46].transpose(2, 0, 1).astype(np.float32) / 255)
    refused("a.png: the image is 40x60 and the model takes 32x32", lambda: pipeline(crop=False, resize=0)(picture))


def test_layouts_and_channels(picture):
    plain = pipeline(resize=0)(picture)
    np.testing.assert_array_equal(pipeline(resize=0, bgr=True)(picture), plain[::-1])
    np.testing.assert_array_equal(pipeline(spec("n", 32, 32, 3), resize=0)(picture), plain.transpose(1, 2, 0))
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"))[4:36, 14:46]
    np.testing.assert_array_equal(pipeline(spec("n", 1, 32, 32), resize=0)(picture)[0], grey.astype(np.float32) / 255)
    raw = pipeline(spec("n", 3, 32, 32, dtype=np.uint8), resize=0)(picture)
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, PIXELS[4:36, 14:46].transpose(2, 0, 1))
    np.testing.assert_array_equal(pipeline(resize=0, scale=1.0)(picture), raw.astype(np.float32))
    assert pipeline(spec("n", 3, 32, 32, dtype=np.float16), resize=0)(picture).dtype == np.float16


def test_grey_palette_and_alpha_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        image = Image.fromarray(PIXELS).convert(mode)
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        image.save(path)
        expected = np.asarray(image.convert("RGB"))[4:36, 14:46].transpose(2, 0, 1).astype(np.float32) / 255
        np.testing.assert_array_equal(pipeline(resize=0)(path), expected)


def test_exif_turns_the_image_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise by 90 degrees to be upright
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(PIXELS, -1)[14:46, 4:36]
    np.testing.assert_array_equal(pipeline(resize=0)(tmp_path / "a.png"), upright.transpose(2, 0, 1).astype(np.float32) / 255)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Twelve images of one shade each, 20 apart, in classes ant (4), bee (0) and cat (8)."""
    for name in ("cat", "ant", "bee", ".hidden"):
        (tmp_path / name).mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (i * 20,) * 3).save(tmp_path / ("ant" if i < 4 else "cat") / f"{i:02}.png")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / ".hidden" / "a.png")
    return tmp_path


def shades(data) -> list[int]:
    return [round(float(image.mean()) * 255 / 20) for batch in data for image in batch["x"]]


def test_folder(folder):
    data = open_data(str(folder), spec(), images=ImageOptions(resize=0, mean=(0.0,), std=(1.0,)))
    assert data.samples == 12
    assert data.labels.tolist() == [0] * 4 + [2] * 8
    assert [len(batch["x"]) for batch in data] == [8, 4]
    assert shades(data) == list(range(12))
    assert data.notes == []
    assert data.description == f"{folder}: 12 images: RGB -> centre crop 32x32 -> scale 1/255 -> float32 CHW"


def test_a_sample_of_a_folder_is_shuffled_by_the_seed(folder):
    some = open_data(str(folder), spec(), samples=5)
    again, other = open_data(str(folder), spec(), samples=5), open_data(str(folder), spec(), samples=5, seed=1)
    assert shades(some) == shades(some) == shades(again) != shades(other)
    assert len(set(shades(some))) == 5
    assert some.labels.tolist() == [0 if shade < 4 else 2 for shade in shades(some)]
    assert "5 of 12 images" in some.description


def test_a_fixed_batch_of_images(folder):
    data = open_data(str(folder), spec(5, 3, 32, 32))
    assert [len(batch["x"]) for batch in data] == [5, 5]
    assert data.samples == len(data.labels) == 10
    assert "the last 2 samples of 12 can't fill a batch of 5" in " ".join(data.notes)


def test_what_is_assumed_is_noted(folder):
    notes = open_data(str(folder), spec("n", 3, "h", "w")).notes
    assert notes == [
        "input 'x' takes float32 (n, 3, h, w); images are made 224x224, as no size is given",
        "neither a resize nor crop_pct is given; 0.875 is taken, timm's default, for images larger than 224x224",
        "no mean and std are given: values are scaled to [0, 1] and not normalised",
    ]
    shaped = open_data(str(folder), spec("n", 3, "h", "w"), input_shapes={"x": (1, 3, 16, 16)})
    assert next(iter(shaped))["x"].shape == (8, 3, 16, 16)
    _, notes = resolve(spec("n", 3, 8, 8, dtype=np.uint8)[0], ImageOptions(crop_pct=1.0, mean=MEAN))
    assert notes == ["input 'x' takes uint8 (n, 3, 8, 8): it gets pixels as they are, so scale, mean and std aren't used"]


def test_images_outside_the_sub_folders_leave_no_labels(folder):
    Image.new("RGB", (32, 32)).save(folder / "loose.png")
    data = open_data(str(folder), spec())
    assert data.labels is None
    assert "some images lie outside its sub-folders, so there are no labels" in data.notes[0]


def test_a_corrupt_image_is_named(folder):
    whole = (folder / "cat" / "07.png").read_bytes()
    (folder / "cat" / "07.png").write_bytes(whole[:60])
    refused("07.png: the image can't be decoded", lambda: open_data(str(folder), spec()))
    (folder / "cat" / "07.png").write_bytes(b"")
    refused("07.png: the image can't be decoded", lambda: open_data(str(folder), spec()))
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "cat" / "07.png")
    refused("07.png: the image has more than 8 bits per channel", lambda: open_data(str(folder), spec()))


def test_models_that_take_no_images(folder, tmp_path):
    refused("input 'x' takes float32 (n, 3), which isn't images", lambda: open_data(str(folder), spec("n", 3)))
    refused("images have 1, 3 or 4 channels, not 7", lambda: open_data(str(folder), spec("n", 7, 8, 8)))
    refused("images serve a model with one input, and this one has 2", lambda: open_data(str(folder), spec() * 2))
    (tmp_path / "empty").mkdir()
    refused("no images (.bmp", lambda: open_data(str(tmp_path / "empty"), spec()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 64}, "so images of 64x64 don't fit"),
        ({"interpolation": "cubic"}, "interpolation 'cubic' isn't known; give nearest, lanczos"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0; it must be above 0"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values"),
        ({"std": (0.0,)}, "std is 0.0; every value must be above 0"),
    ],
)
def test_options_that_contradict_the_model(options, text):
    with pytest.raises(UsageError, match=re.escape(text)):
        pipeline(**options)


# Configurations


def config(tmp_path, settings) -> ImageOptions:
    (tmp_path / "c.json").write_text(json.dumps(settings))
    return ImageOptions.from_config(tmp_path / "c.json")


TIMM = {"input_size": [3, 32, 32], "crop_pct": 0.95, "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_mode": "center"}


def test_timm(tmp_path):
    for settings in (TIMM, {"architecture": "resnet50", "pretrained_cfg": TIMM}):
        assert str(pipeline(**vars(config(tmp_path, settings)))).startswith(
            "RGB -> resize to shorter side 33 (bicubic) -> centre crop 32x32 -> scale 1/255 -> mean 0.485"
        )
    squash = config(tmp_path, {**TIMM, "crop_mode": "squash"})
    assert "resize to 33x33 (bicubic) -> centre crop 32x32" in str(pipeline(**vars(squash)))
    refused("c.json: crop_mode 'border' isn't served", lambda: config(tmp_path, {**TIMM, "crop_mode": "border"}))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3},
            "resize to shorter side 36 (bicubic) -> centre crop 32x32 -> scale 1/255 -> mean",
        ),
        ({"size": 36, "crop_size": 32, "do_center_crop": True, "resample": 2}, "resize to shorter side 36 (bilinear) -> centre crop 32x32"),
        ({"size": {"height": 32, "width": 32}, "resample": 0}, "resize to 32x32 (nearest) -> scale 1/255 -> mean"),
        ({"size": 32, "do_rescale": True, "rescale_factor": 0.5}, "resize to 32x32 (bilinear) -> scale 0.5 -> mean"),
        ({"size": 32, "do_rescale": False, "do_normalize": False}, "resize to 32x32 (bilinear) -> scale 1 -> float32"),
        ({"size": 64, "crop_size": 32, "do_resize": False, "do_center_crop": True}, "RGB -> centre crop 32x32 -> scale 1/255"),
        ({"size": {"shortest_edge": 32}, "crop_pct": 0.875}, "resize to shorter side 36 (bilinear) -> centre crop 32x32"),
    ],
)
def test_hugging_face(tmp_path, settings, steps):
    assert steps in str(pipeline(**vars(config(tmp_path, {"image_mean": MEAN, "image_std": STD, **settings}))))


def test_hugging_face_in_bgr(tmp_path):
    settings = {"size": {"shortest_edge": 36}, "crop_size": 32, "do_flip_channel_order": True}
    assert "-> BGR -> float32" in str(pipeline(**vars(config(tmp_path, settings))))


@pytest.mark.parametrize("key", ["rescale_offset", "include_top", "do_pad"])
def test_hugging_face_settings_that_are_not_served(tmp_path, key):
    refused(f"c.json: {key} isn't served", lambda: config(tmp_path, {"size": 32, key: True}))
    config(tmp_path, {"size": 32, key: False})


def test_image_options_for_arrays_are_noted(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3, 32, 32), np.float32))
    spec = InputSpec("x", np.dtype(np.float32), ("n", 3, 32, 32))
    assert "the image options aren't used" in open_data(str(tmp_path / "a.npy"), [spec], images=ImageOptions(bgr=True)).notes[0]


def test_configurations_that_are_none(tmp_path):
    refused("c.json: neither timm's pretrained_cfg (input_size) nor", lambda: config(tmp_path, {"layers": 3}))
    refused("c.json: neither", lambda: config(tmp_path, [1]))
    refused("c.json: a setting has a form that bnfold doesn't know", lambda: config(tmp_path, {**TIMM, "input_size": 32}))
    refused("c.json: size {'longest_edge': 3} isn't served", lambda: config(tmp_path, {"size": {"longest_edge": 3}}))
    (tmp_path / "c.json").write_text("{")
    refused("c.json: can't be read as JSON", lambda: ImageOptions.from_config(tmp_path / "c.json"))
