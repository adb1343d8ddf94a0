"""What the stages share."""

import pytest

from sdtrain.stage.base import images_at_once


@pytest.mark.parametrize(("image_size", "expected"), [(64, 128), (256, 64), (512, 16), (1024, 4), (4096, 1)])
def test_large_pictures_are_taken_few_at_once(image_size, expected):
    assert images_at_once(128, image_size) == expected
