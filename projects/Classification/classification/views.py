"""The random views of small grey photos for MoCo."""

from torchvision import transforms as T


def grey_view(size: int, least: float = 0.2, jitter: float = 0.4) -> T.Compose:
    """Return MoCo-v2's transform of a PIL image (arXiv:2003.04297) without what small photos without colours lack.

    That is a random crop, brightness with probability 0.8, and a mirror. There is no hue, saturation or blur, and no
    contrast, which costs more time than the rest. The ranges are plain numbers: a transform that holds them as nodes of
    a LazyConfig reads them again, and slowly, for every image.

    Args:
        size: side of the view in pixels, > 0.
        least: the smallest share of the photo that a crop keeps, in (0, 1].
        jitter: brightness changes by a factor of 1 - jitter to 1 + jitter; in [0, 1].
    """
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(least, 1.0)),
            T.RandomApply([T.ColorJitter(brightness=jitter)], p=0.8),
            T.RandomHorizontalFlip(),
        ]
    )
