import os
import subprocess
import sys

import numpy as np

from serving_export import answer


def test_answers_from_anywhere_without_the_package(world, tiny, tmp_path):
    """The folders that the export was made from are gone, and it was moved."""
    histories = [[tiny.item(1), tiny.item(2)], ["", ""], [tiny.item(4), ""]]
    request = {
        "history": np.char.encode(histories, "utf-8"),
        "member": np.array([b"", b"", b"user 3"]),
        "country": np.array([b"dk"] * 3),
        "basket": np.full(3, np.nan, np.float32),
        "clicked_at": np.full(3, -1, np.int64),
        "taste": np.zeros([3, 3], np.float32),
        "exclusions": np.zeros([3, 0], bytes),
        "k": np.int32(4),
    }
    np.savez(tmp_path / "request.npz", **{f"input_{name}": v for name, v in request.items()})
    folders = [f"{name}={world.exported.directory / name}" for name in ("exact", "scann")]
    environment = {n: v for n, v in os.environ.items() if n != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-I", answer.__file__, *folders],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [np.load(tmp_path / f"{name}.npz") for name in ("exact", "scann")]
    assert answers[0]["ids"].shape == answers[0]["scores"].shape == (3, 4)
    assert answers[0]["ids"].tolist() == answers[1]["ids"].tolist()
    np.testing.assert_allclose(answers[0]["scores"], answers[1]["scores"], atol=1e-5)
    assert answers[0]["ids"][1].tolist() == [tiny.item(n).encode() for n in range(4)]
