"""Real data that train in seconds: scikit-learn's 1,797 handwritten digits of 8x8 px, as a folder of images."""

from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits


def write_digits(folder, train=1400, val=397, side=32):
    """Write ``folder/{train,val}/{0..9}/NUMBER.png``; return the folder.

    Args:
        train, val: how many images, the first and the last ones of the set: writers of one are not in the other.
        side: of an image, a multiple of 8 px. Each pixel of the digits becomes a square.
    """
    digits = load_digits()
    images = np.kron(digits.images * 255 / 16, np.ones((side // 8, side // 8))).round().astype(np.uint8)
    for split, numbers in (('train', range(train)), ('val', range(len(images) - val, len(images)))):
        for number in numbers:
            path = Path(folder, split, str(digits.target[number]), f'{number:04}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), images[number])
    return Path(folder)
