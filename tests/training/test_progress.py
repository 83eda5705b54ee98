import time

from training.progress import advance, idle_seconds


def test_time_counts_from_the_last_piece_of_work():
    advance()
    time.sleep(0.05)
    assert 0.05 <= idle_seconds() < 5
    advance()
    assert idle_seconds() < 0.05
