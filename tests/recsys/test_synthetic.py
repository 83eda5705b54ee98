import numpy as np

from recsys.synthetic import CLICKS_PER_SESSION, clickstream


def test_same_seed_gives_the_same_clicks_and_another_seed_others():
    first, again, other = clickstream(seed=3), clickstream(seed=3), clickstream(seed=4)
    assert np.array_equal(first.item, again.item)
    assert not np.array_equal(first.item, other.item)


def test_the_planted_successor_follows_as_often_as_asked():
    clicks = clickstream(num_sessions=4000, predictability=0.7)
    items = clicks.item.reshape(-1, CLICKS_PER_SESSION)
    follows = items[:, 1:] == clicks.successor[0, items[:, :-1]]
    # A stray click hits the successor by chance, one time in nine.
    assert abs(follows.mean() - (0.7 + 0.3 / 9)) < 0.02


def test_clicks_stay_in_their_cluster_and_time_goes_on():
    clicks = clickstream()
    items = clicks.item.reshape(-1, CLICKS_PER_SESSION)
    clusters = clicks.cluster[items]
    assert (clusters == clusters[:, :1]).all()
    assert clicks.clicked_at == sorted(clicks.clicked_at)
    assert len(clicks) == len(clicks.clicked_at) == 3000


def test_a_session_follows_the_successors_of_its_mood():
    clicks = clickstream(predictability=1.0, num_moods=2)
    items = clicks.item.reshape(-1, CLICKS_PER_SESSION)
    moods = clicks.successor[:, items[:, :-1]] == items[:, 1:]
    assert moods.all(axis=2).any(axis=0).all()
    assert not moods[0].all(axis=1).all()
    assert not moods[1].all(axis=1).all()
