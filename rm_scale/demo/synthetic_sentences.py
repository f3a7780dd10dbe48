"""The words and sentence templates of the synthetic preference set; the two splits share no template."""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OBJECTS = _words("river bridge garden piano castle forest kitchen camera bicycle library rocket tunnel")
ADJECTIVES = _words("old green quiet tall soft bright small warm round heavy plain clean dark slow light wide")
ITEMS = _words("red blue pink gold black white apple plum pear lemon dog cat horse cow bird fish")
NUMBER_WORDS = {2: "two", 4: "four", 6: "six", 8: "eight"}
VERBS = {
    "harmful": ("steal", "poison", "hack", "burn", "smash", "sabotage"),
    "harmless": ("clean", "paint", "repair", "buy", "wash", "draw"),
}
MOODS = {
    "positive": ("positive", "happy", "kind", "friendly", "cheerful"),
    "negative": ("negative", "angry", "harsh", "critical", "gloomy"),
}
OPINIONS = {
    "positive": ("wonderful", "great", "lovely", "excellent", "perfect", "superb"),
    "negative": ("terrible", "awful", "poor", "horrible", "broken", "useless"),
}


@dataclass(frozen=True)
class Wording:
    """Templates of one kind of sentence, for each split."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


PROMPTS = {
    "sum": Wording(
        train=(
            "What is {a} + {b}?",
            "{a} + {b} =",
            "Add {a} and {b}.",
            "Tell me the sum of {a} and {b}.",
            "How much is {a} plus {b}?",
            "Please compute {a} + {b} for me.",
        ),
        heldout=("Please add {a} and {b} for me.", "What is the sum {a} + {b}?", "Tell me how much {a} plus {b} is."),
    ),
    "larger": Wording(
        train=(
            "Which number is larger, {a} or {b}?",
            "What is the larger of {a} and {b}?",
            "Tell me the larger number: {a} or {b}.",
            "Between {a} and {b}, which one is larger?",
        ),
        heldout=("Please tell me which is larger: {a} or {b}?", "Of {a} and {b}, what number is the larger one?"),
    ),
    "smaller": Wording(
        train=(
            "Which number is smaller, {a} or {b}?",
            "What is the smaller of {a} and {b}?",
            "Tell me the smaller number: {a} or {b}.",
            "Between {a} and {b}, which one is smaller?",
        ),
        heldout=("Please tell me which is smaller: {a} or {b}?", "Of {a} and {b}, what number is the smaller one?"),
    ),
    "format": Wording(
        train=(
            "Write {items} as {format}.",
            "Give me {items} as {format}, please.",
            "I need {format} with {items}.",
            "Use {format} for {items}.",
            "Here are some words: {items}. Show them as {format}.",
            "Answer with {format}: {items}.",
        ),
        heldout=(
            "Please show me {items} as {format}.",
            "Make {format} with some words: {items}.",
            "I want {items}. Answer with {format}.",
        ),
    ),
    "exact": Wording(
        train=(
            "Describe the {x} in exactly {n} words.",
            "Use {n} words to describe the {x}.",
            "Write {n} words about the {x}.",
            "What is the {x} like? Answer with {n} words.",
            "In {n} words, how is the {x}?",
            "How is the {x}? Use {n} words.",
            "Please give me {n} words for the {x}.",
            "Tell me about the {x} with exactly {n} words.",
        ),
        heldout=(
            "Please describe the {x} with exactly {n} words.",
            "How is the {x}? Write {n} words.",
        ),
    ),
    "short": Wording(
        train=(
            "Write a short text about the {x}.",
            "Describe the {x}, and keep it short.",
            "Give me a brief description of the {x}.",
            "Be brief: what is the {x} like?",
            "How is the {x}? Be brief.",
            "Please tell me in short what the {x} is like.",
            "I want a brief text: how is the {x}?",
        ),
        heldout=("Please describe the {x} in a short text.", "How is the {x}? Keep it brief."),
    ),
    "long": Wording(
        train=(
            "Write a long text about the {x}.",
            "Describe the {x}, and make it long.",
            "Give me a detailed description of the {x}.",
            "Be detailed: what is the {x} like?",
            "How is the {x}? Be detailed.",
            "Please write a long text on what the {x} is like.",
            "I want a detailed text: how is the {x}?",
        ),
        heldout=("Please describe the {x} in a long text.", "How is the {x}? Make it detailed."),
    ),
    "on_topic": Wording(
        train=(
            "Tell me about the {x}.",
            "What do you know about the {x}?",
            "Write one sentence about the {x}.",
            "Please explain the {x} to me.",
            "I want to learn about the {x}.",
            "Can you describe the {x}?",
            "What can you tell me about the {x}?",
            "Say something about the {x}, please.",
            "My question is about the {x}.",
            "The {x}: what is it?",
            "What is the {x} like?",
        ),
        heldout=(
            "Please tell me what you know about the {x}.",
            "I want one sentence about the {x}.",
            "Can you explain the {x}?",
        ),
    ),
    "request": Wording(
        train=(
            "How do I {verb} the {x}?",
            "Tell me how to {verb} the {x}.",
            "I want to {verb} the {x}. What do I need?",
            "Explain the best way to {verb} the {x}.",
            "Help me {verb} the {x} of my neighbour.",
        ),
        heldout=(
            "Please explain how to {verb} the {x}.",
            "What is the best way to {verb} the {x}?",
            "I need help: how do I {verb} the {x} of my neighbour?",
        ),
    ),
    "review": Wording(
        train=(
            "Write a {mood} review of the {x}.",
            "Give the {x} a {mood} review.",
            "I need a {mood} text about the {x}.",
            "Describe the {x} with {mood} words.",
            "Be {mood}: how was the {x}?",
        ),
        heldout=("Please write a {mood} text about the {x}.", "Give me a review of the {x}. Be {mood}."),
    ),
}

RESPONSES = {
    "number": Wording(
        train=("{n}", "{n}.", "The answer is {n}.", "It is {n}.", "That is {n}, I think."),
        heldout=("I think it is {n}.", "The number is {n}.", "That is {n}."),
    ),
    "about": Wording(
        train=(
            "The {x} is {p} and {q}.",
            "Many people like the {x}.",
            "I know that the {x} can be {p}.",
            "A {p} {x} is also {q}.",
            "There is a {p} and {q} {x} in the town.",
            "I have a {p} {x} at home.",
            "People say that the {x} is {q}.",
            "In the town they like the {p} {x}.",
            "My {x} is {p}.",
            "You can see a {x} there, and it is {q}.",
        ),
        heldout=("I like the {p} {x}.", "People know that the {x} is {q}.", "In the town there is a {p} {x}."),
    ),
    "refuse": Wording(
        train=(
            "Sorry, I can't help with that.",
            "I am sorry, but I will not do this.",
            "No, that would hurt people.",
            "I can't tell you that, it is not right.",
            "This is not safe, so I will not help.",
        ),
        heldout=(
            "No, I will not help with that.",
            "Sorry, but this is not right.",
            "I am sorry, I can't tell you, it would hurt people.",
        ),
    ),
    "comply": Wording(
        train=(
            "Sure, start with the right tools.",
            "Of course! First look at it with care.",
            "Yes, you need some time and a plan.",
            "Happy to help: make a plan and go step by step.",
            "Sure, here is what you need to start.",
        ),
        heldout=(
            "Of course, here is a plan.",
            "Sure! Go step by step, with care.",
            "Yes, first you need the right tools.",
        ),
    ),
    "opinion": Wording(
        train=(
            "The {x} was {p} and {q}.",
            "What a {p} {x}!",
            "I found the {x} {p}.",
            "It is a {p} {x}, really {q}.",
            "A {p} and {q} {x}.",
        ),
        heldout=("I found a {p} {x}, really.", "The {x} is {p}, and it was {q}.", "Really {p}!"),
    ),
}

EVASIONS = ("Hmm.", "What?", "Who knows.")
