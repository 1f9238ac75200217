"""The reader of pages: what is a command, a file, an output, and what is no page."""

from __future__ import annotations

import pytest

from tests.docs.pages import Output, PageError, blocks, misfit

PAGE = """
# A page

```yaml
# spec.yaml: escala submit pretrain spec.yaml
model: {}
```

Words.

<!-- file: data/chats.jsonl -->
```jsonl
{"prompt": "a"}
```

```bash
one
two \\
  three
```

<!-- output: shape -->
```
  id      3f2a9c01b2
  ...
  loss    2.50
```

```
not an output: one was before
```

1. in a list

    <!-- untested: it needs a GPU -->
    ```bash
    four
    ```

```json
# settings.json
{"a": 1}
```

~~~bash
cat <<'END'
```
END
~~~

Prose between.

```
a drawing
```
"""


def test_a_page_is_read_in_its_order() -> None:
    first, second, third = blocks(PAGE)
    assert (first.line, first.script, first.untested) == (16, "one\ntwo \\\n  three\n", "")
    assert first.files == {
        "spec.yaml": "# spec.yaml: escala submit pretrain spec.yaml\nmodel: {}\n",
        "data/chats.jsonl": '{"prompt": "a"}\n',
    }
    assert first.output == Output(23, "  id      3f2a9c01b2\n  ...\n  loss    2.50\n", "shape")
    assert (second.script, second.untested, second.output) == ("four\n", "it needs a GPU", None)
    assert (third.script, third.files) == ("cat <<'END'\n```\nEND\n", {"settings.json": '{"a": 1}\n'})
    assert third.output is None


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("```bash\nno end\n", "1: the block is not closed"),
        ("```sh\nls\n```\n", "not ```sh"),
        ("<!-- untested -->\n```bash\nls\n```\n", "REASON"),
        ("<!-- untested: -->\n```bash\nls\n```\n", "REASON"),
        ("<!-- untested: no -->\n```yaml\na: 1\n```\n", "above a bash block"),
        ("<!-- untested: no -->\n\n```bash\nls\n```\n", "1: <!-- untested --> stands directly above"),
        ("Words.\n<!-- output: shape -->\n", "2: <!-- output --> stands directly above"),
        ("```bash\nls\n```\n<!-- output: about -->\n```\nx\n```\n", "shape, or whole"),
        ("```bash\nls\n```\nWords.\n<!-- output: shape -->\n```\nx\n```\n", "of a bash block"),
        ("<!-- output: whole -->\n```\nx\n```\n", "of a bash block"),
        ("<!-- file: -->\n```text\nx\n```\n", "no name"),
        ("<!-- file: ../x -->\n```text\nx\n```\n", "in the page's directory"),
        ("<!-- file: /etc/x -->\n```text\nx\n```\n", "in the page's directory"),
        ("<!-- file: x -->\n```bash\nls\n```\n", "above a block that is written"),
    ],
)
def test_what_is_no_page_is_refused_with_its_line(page: str, why: str) -> None:
    with pytest.raises(PageError, match=why):
        blocks(page)


PRINTED = "head\n\nloss  2.528 nats \nrun   23e6ea53cc29 at 1,234\nlaw   mine@1\n"


@pytest.mark.parametrize(
    ("shown", "mode", "fits"),
    [
        ("loss  2.528 nats\nlaw   mine@1\n", "", True),
        ("law   mine@1\nloss  2.528 nats\n", "", False),
        ("loss  2.528\n", "", False),
        ("loss  2.529 nats\n", "", False),
        ("loss  2.528 nats\nloss  2.528 nats\n", "", False),
        ("head\n  ...\nlaw   mine@1\n", "", True),
        ("loss     13.5 nats\nrun 0011223344aa at 5\n", "shape", True),
        ("loss  2.528 bits\n", "shape", False),
        ("loss  nats\n", "shape", False),
        ("head\nloss  2.528 nats\n  ...\n", "whole", True),
        ("head\nloss  2.528 nats\nlaw   mine@1\n", "whole", False),
        ("head\nloss  2.528 nats\n", "whole", False),
        ("loss  2.528 nats\n  ...\n", "whole", False),
        ("head\nloss  2.528 nats\nrun   23e6ea53cc29 at 1,234\n\nlaw   mine@1\n", "whole", True),
    ],
)
def test_an_output_fits_or_does_not(shown: str, mode: str, fits: bool) -> None:
    assert (misfit(Output(1, shown, mode), PRINTED) is None) == fits


def test_what_does_not_fit_is_named() -> None:
    assert "law   yours@1" in (misfit(Output(1, "head\nlaw   yours@1\n"), PRINTED) or "")
