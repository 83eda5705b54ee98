from recsys.config import RunConfig
from recsys.steps import STEPS, steps_of


def test_ranking_is_a_step_where_the_config_has_its_section(config):
    assert steps_of(config) == [step for step in STEPS if step != "rank"]
    ranking = {"candidates": 20}
    ranked = RunConfig.model_validate(config.model_dump() | {"ranking": ranking})
    assert steps_of(ranked) == list(STEPS)


def test_each_step_leaves_its_own_manifest_in_its_own_folder():
    assert len({folder for folder, _ in STEPS.values()}) == len(STEPS)
    assert all(kind.step == name for name, (_, kind) in STEPS.items())
