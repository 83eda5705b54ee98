import pytest
from pydantic import ValidationError

from recsys.section import Section


class Shop(Section):
    name: str


def test_a_section_is_frozen_and_refuses_unknown_keys():
    shop = Shop(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        shop.name = "b"
    with pytest.raises(ValidationError, match="title"):
        Shop.model_validate({"title": "a"})
