"""Form of an error's message."""


def one_line(error: BaseException) -> str:
    """Return the message, which is one line in lower case with the next step after a colon.

    Macros may begin it in capitals.
    """
    message = str(error)
    first = message.split(maxsplit=1)[0]
    assert "\n" not in message
    assert not first[0].isupper() or first.startswith("KVM_")
    assert ": " in message
    return message
