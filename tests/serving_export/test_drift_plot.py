import matplotlib.image

from recsys.drift_report import DriftReport, Finding
from serving_export.drift_plot import draw


def test_a_picture_of_all_measures_bars_above_their_limit_in_red(tmp_path):
    def report(found):
        finding = Finding(of="country", measure="psi", found=found, allowed=0.25)
        quiet = Finding(of="country", measure="unknown_rise", found=-0.1, allowed=None)
        drop = Finding(of="recommended.coverage", measure="coverage_drop", found=0.1, allowed=0.2)
        return DriftReport(
            name="shop", model_version="3", reference="data", reference_users=3, users=2, k=2,
            sample_users=2, coverage=(1.0, 0.9), distributions=(),
            findings=(finding, quiet, drop),
        )  # fmt: skip

    red = {}
    for found in (0.1, 0.6):
        draw(report(found), tmp_path / "drift.png")
        pixels = matplotlib.image.imread(tmp_path / "drift.png")[..., :3]
        assert pixels.shape[1] == 1200
        red[found] = int(((pixels[..., 0] > 0.7) & (pixels[..., 1:].max(axis=-1) < 0.3)).sum())
    assert red[0.1] == 0
    assert red[0.6] > 1000
