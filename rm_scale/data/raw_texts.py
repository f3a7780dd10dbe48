"""Bring a conversation that someone else rendered to the text that the chat template gives for its messages.

Whoever decodes a policy's tokens has a text that stops at the end-of-turn token, or that was cut before it, while the
template writes more: a line break, a space, EOS. The score is read at the last token, so all of it is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rm_scale.data.message_content import has_reasoning
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.template_probe import AnswerFrame

_SHOWN_CHARACTERS = 60


def complete_conversation(
    text: str,
    frame: AnswerFrame,
    write_answer: Callable[[str], str | None],
    bos: str | None,
    special: Collection[str],
    ends: Collection[str],
) -> str:
    """Return a rendered conversation as its chat template writes it, the last answer's end above all.

    Args:
        text: holds `frame.opening`.
        frame: what the template writes around an answer.
        write_answer: returns what the template writes for an answer, from `frame.opening` on; `None` if it can't.
        bos: the tokenizer's BOS.
        special: its added tokens.
        ends: its EOS and padding token, which a policy may write behind an answer.

    Raises:
        RejectedRow: `unfinished_text`, since it does not end with an answer, or ends as no answer does, or since it
            can't be told where the answer begins.
    """
    if bos:
        text = (bos if frame.writes_bos else "") + text.removeprefix(bos)
    starts = _possible_starts(text, frame, special)
    readings = [_reading(text, start, frame, write_answer, special, ends) for start in starts]
    first, last = readings[0], readings[-1]
    asking = frame.asking.removeprefix(bos or "")
    if first == last or (asking and asking in text[starts[0] : starts[-1]]):
        last = first  # also where the policy went on with turns of its own making
    for reading in (last, first):
        if isinstance(reading, RejectedRow):
            raise reading
    assert isinstance(last, str)
    if first != last:
        what = f"holds {frame.opening!r} twice, and it can't be told where the answer begins"
        raise _unfinished(text[starts[0] :], what)
    return last


def ends_question(text: str, frame: AnswerFrame) -> bool:
    """Tell whether the last answer of a text stands behind the end of a question, as this frame has it."""
    return text[: text.rindex(frame.opening)].endswith(frame.before)


def choose_reading(text: str, readings: Sequence[tuple[AnswerFrame, str | RejectedRow]]) -> str:
    """Return what the chat template that wrote a text makes of it, of several templates.

    Args:
        text: a rendered conversation.
        readings: what each template writes around an answer, and what it makes of the text, or why it can't.

    Raises:
        RejectedRow: `unfinished_text`: none can complete it, or they do so differently and it ends as none does.
    """
    complete = [(frame, found) for frame, found in readings if isinstance(found, str)]
    if len({found for _, found in complete}) > 1:
        complete = [(frame, found) for frame, found in complete if frame.ending and text.endswith(frame.ending)]
        if not complete:
            raise _unfinished(text, "ends as no chat template does, and it can't be told which of them it is from")
        # One ending may be the end of another: "\n" of "<|im_end|>\n".
        return max(complete, key=lambda one: len(one[0].ending))[1]
    if complete:
        return complete[0][1]
    refusal = readings[0][1]
    assert isinstance(refusal, RejectedRow)
    raise refusal


def _possible_starts(text: str, frame: AnswerFrame, special: Collection[str]) -> list[int]:
    """Return where the opening of the last answer may stand: one place, or the first and the last possible one.

    Ordinary text, such as `ASSISTANT:`, may be part of what is said too; a special token is taken for what it is.
    """
    last = text.rindex(frame.opening)
    if not frame.end_of_turn or any(token in frame.opening for token in special if token):
        return [last]
    ended = text.rfind(frame.end_of_turn, 0, last)
    place = text.index(frame.opening, 0 if ended < 0 else ended + len(frame.end_of_turn))
    places = []
    while place >= 0:
        places.append(place)
        place = text.find(frame.opening, place + len(frame.opening))
    behind = [place for place in places if text.endswith(frame.before, 0, place)] or places
    return sorted({behind[0], behind[-1]})


def _reading(
    text: str,
    start: int,
    frame: AnswerFrame,
    write_answer: Callable[[str], str | None],
    special: Collection[str],
    ends: Collection[str],
) -> str | RejectedRow:
    try:
        return _completed(text, start, frame, write_answer, special, ends)
    except RejectedRow as rejected:
        return rejected


def _completed(
    text: str,
    start: int,
    frame: AnswerFrame,
    write_answer: Callable[[str], str | None],
    special: Collection[str],
    ends: Collection[str],
) -> str:
    """Return the text with its end, where the last answer's opening stands at `start`.

    Raises:
        RejectedRow: `unfinished_text`.
    """
    opening = frame.whole_opening if text.startswith(frame.whole_opening, start) else frame.opening
    head, said = text[:start], text[start + len(opening) :]
    answer = _answer_in(said, frame, special, ends)
    as_it_stands = head + opening + answer + frame.ending
    if any(mark in answer for mark in frame.marks):
        return as_it_stands  # the answer brings its own frame, such as a channel, which the template would double
    written = write_answer(answer)
    if written is None:
        return as_it_stands
    rendered = head + written
    if not frame.ending.strip() or text != as_it_stands or has_reasoning(answer):
        return rendered
    # A whole rendering stays, but for white space: the template may have known more than the text shows.
    return rendered if "".join(rendered.split()) == "".join(text.split()) else text


def _answer_in(said: str, frame: AnswerFrame, special: Collection[str], ends: Collection[str]) -> str:
    """Return the answer without what follows it.

    Raises:
        RejectedRow: `unfinished_text`.
    """
    if frame.end_of_turn and frame.end_of_turn in said:
        answer, _, after = said.partition(frame.end_of_turn)
        for token in (*ends, *(token for token in special if token in frame.ending)):
            after = after.replace(token, "")
        # The rest of an ending that is not made of special tokens, or of a part of it.
        tail = frame.ending.partition(frame.end_of_turn)[2].strip()
        if after.strip() and not tail.startswith(after.strip()):
            if said.endswith(frame.ending) and frame.asking and frame.asking not in said:
                return said.removesuffix(frame.ending)  # whole: the answer itself holds the text of an end
            raise _unfinished(said, f"goes on after {frame.end_of_turn!r}, which ends the assistant's last turn")
        return answer.removesuffix(frame.ending.partition(frame.end_of_turn)[0])
    answer = said.removesuffix(frame.ending) if frame.ending.strip() else said
    answer = _without_ends(answer, ends)
    if not answer.strip() and len(answer) == len(said):
        raise _unfinished(said, "ends before the assistant says anything")
    last = next((token for token in special if token and answer.rstrip().endswith(token)), None)
    if last is not None:
        raise _unfinished(said, f"ends with {last!r}, which does not end an answer in this template")
    return answer


def _without_ends(text: str, ends: Collection[str]) -> str:
    shorter = text
    for token in ends:
        shorter = shorter.removesuffix(token)
    return text if shorter == text else _without_ends(shorter, ends)


def _unfinished(said: str, what: str) -> RejectedRow:
    return RejectedRow("unfinished_text", f"the text {what} (it ends in {said[-_SHOWN_CHARACTERS:]!r})")
