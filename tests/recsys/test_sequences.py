import numpy as np

from recsys.sequences import WHOLE, Order, Share, training_batches


def test_replicas_share_each_global_batch(prepared):
    def users(share, skip=0):
        stream = training_batches(
            prepared, [prepared.train], 7, Order(range(1), 1, 10_000, skip), share
        )
        return [
            {k: batch[k].numpy() for k in ("label", "known", "pool", "place")} for batch in stream
        ]

    whole = users(WHOLE)
    parts = [users(Share(range(rank, rank + 1), 3)) for rank in range(3)]
    both = users(Share(range(0, 2), 3))
    assert sum(len(batch["label"]) for batch in whole) == prepared.train.num_examples
    for number, batch in enumerate(whole):
        own = [part[number] for part in parts]
        assert all((o["pool"] == batch["label"]).all() for o in own)
        assert all((o["pool"][o["place"]] == o["label"]).all() for o in own)
        places = np.concatenate([o["place"] for o in own])
        assert sorted(places) == list(range(len(batch["label"])))
        for rank in range(2):
            np.testing.assert_array_equal(both[2 * number + rank]["label"], own[rank]["label"])
    rest = users(Share(range(1, 2), 3), skip=4)
    assert len(rest) == len(whole) - 4
    np.testing.assert_array_equal(rest[0]["label"], parts[1][4]["label"])


def test_a_replica_may_have_no_sequence(prepared):
    stream = training_batches(
        prepared, [prepared.train], 1, Order(range(1), 1, 10_000), share=Share(range(1, 2), 2)
    )
    batch = next(iter(stream))
    assert len(batch["label"]) == 0
    assert len(batch["pool"]) > 0
    assert batch["history"].shape[0] == 0
