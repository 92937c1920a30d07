"""What the Hub's client raises shows neither the access token nor a signed address."""

import pytest

from equalize.commands.push.hub_errors import hub_errors
from equalize.errors import InputError, ResourceError


def ignore(line):
    pass


def test_secrets_are_cut_out_of_the_line():
    told = "my own secret and hf_0123456789 at https://store/x?X-Signature=key"
    with pytest.raises(ResourceError) as caught, hub_errors("acme/streets", "my own secret", ignore):
        raise RuntimeError(told)
    assert str(caught.value).startswith("acme/streets: the upload failed (*** and *** at https://store/x); push again")


def test_our_own_errors_pass_unchanged():
    with pytest.raises(InputError, match=r"^x: mine$"), hub_errors("acme/streets", "token", ignore):
        raise InputError("x", "mine")


def test_mistakes_of_our_own_are_not_blamed_on_the_hub():
    with pytest.raises(TypeError), hub_errors("acme/streets", "token", ignore):
        raise TypeError
