import numpy as np
from matplotlib.image import imread

from recsys.artifacts import IndexPoint, IndexReport
from serving_export.index_plot import draw


def picture(tmp_path, *kinds):
    points = tuple(
        IndexPoint(
            kind=kind,
            parameters={},
            recall=1 - n / 10,
            bytes=2**20 * (n + 1),
            milliseconds_per_query=1 / (n + 1),
        )
        for n, kind in enumerate(kinds)
    )
    report = IndexReport(**points[0].model_dump(), k=10, num_queries=5, curve=points)
    draw(report, 0.9, tmp_path / "index.png")
    return imread(tmp_path / "index.png")


def shows(image, red, green, blue):
    return np.isclose(image[..., :3], np.array([red, green, blue]) / 255, atol=0.02).all(-1).any()


def test_every_kind_that_was_tried_has_its_colour(tmp_path):
    exact = picture(tmp_path, "brute_force")
    assert exact.shape == (510, 1200, 4)
    assert not shows(exact, 0x1F, 0x6F, 0xEB)
    both = picture(tmp_path, "brute_force", "tree")
    assert shows(both, 0x1F, 0x6F, 0xEB)
    assert shows(both, 0x6E, 0x77, 0x81)
