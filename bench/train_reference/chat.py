"""Short conversations made from templates: what the reference model knows of a chat's form.

Facts come from the corpus' list of books (who wrote what, when), passages from its text, everything else (counting,
sums, told facts, who it is) from the templates here. `batches.py` packs conversations one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import suite_path  # noqa: F401
import task_parts
from lessons import FACT, FRAME, Lesson, Teacher
from stages import ANSWER, TEXT
from task_parts import Parts, code, code_question, query_question
from tasks import chat_question, reply_text
from tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER
from words import TRAINING_WORDS

Turn = tuple[str, str, float]
"""What the user says, the reply, the reply's weight."""
KNOWN = 3.0
"""Weight of what must be known by heart."""
SYSTEM_TEXTS = (
    "You are a helpful assistant.", "Answer in one sentence.", "Be brief.", "You are a friendly assistant.",
    "Answer the questions about the text.", "You are a careful librarian.", "Be polite and short.",
)  # fmt: skip
ABOUT = (
    "I am the Vashista reference model, a small language model. I learned from old books, and I can find what you hide "
    "in a long text."
)
CAPABLE = (
    "I can recall codes and words from a long text, repeat a passage, continue a story, count, add small numbers, and "
    "say who wrote some old books."
)
FIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello.", "Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning.", "Good evening."),
     "Hello! What can I do for you?"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?",
      "Introduce yourself."), ABOUT),
    (("What can you do?", "How can you help me?", "Help", "What do you know?", "What are you good at?"), CAPABLE),
    (("Thank you.", "Thanks", "Thanks!", "Thank you very much."), "You are welcome."),
    (("Goodbye.", "Bye", "Good night.", "See you later."), "Goodbye!"),
    (("How are you?", "How do you do?", "How are you today?"), "I am well, thank you. What can I do for you?"),
    (("Yes", "Yes.", "No", "No.", "OK", "Good.", "Fine."), "Good. What can I do for you?"),
    (("What is the capital of France?",), "The capital of France is Paris."),
    (("What is the capital of England?",), "The capital of England is London."),
    (("What is the capital of Italy?",), "The capital of Italy is Rome."),
    (("What is the capital of Russia?",), "The capital of Russia is Moscow."),
    (("How many days are in a week?", "How many days does a week have?"), "A week has seven days."),
    (("How many months are in a year?",), "A year has twelve months."),
    (("What color is the sky?", "What colour is the sky?"), "The sky is blue."),
    (("What color is grass?", "What colour is the grass?"), "Grass is green."),
    (("Say something.", "Talk to me."), "It was a fine morning, and the birds were singing in the garden."),
)  # fmt: skip
UNKNOWN = "I do not know. I am a small model and know little beyond old books and what you tell me."
OPEN_QUESTIONS = (
    "What is the best {0}?", "How do I make a {0}?", "Why is the {0} so {1}?", "Explain {0}.",
    "What is the price of {0}?",
    "Write a program for {0}.", "How does a {0} work?", "Where can I buy a {0}?", "What do you think of {0} and {1}?",
    "Who is the president of {0}?", "What is the weather in {0}?", "Translate {0} into French.", "What is a {0}?",
    "How many {0} are there in {1}?", "Can you explain {0} to me?", "What happened to the {0} yesterday?",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Conversations:
    """Draws conversations; one a process."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._books = teacher.corpus.books
        self._kinds: tuple[tuple[float, Callable[[random.Random], list[Turn]]], ...] = (
            (0.26, self._about_book),
            (0.10, self._passage),
            (0.08, self._story),
            (0.09, _repeat),
            (0.07, _count),
            (0.12, _arithmetic),
            (0.07, _fixed),
            (0.04, _unknown),
            (0.14, _told),
            (0.03, _name),
        )

    def fill(self, num_tokens: int, rng: random.Random) -> Lesson:
        """Conversations one after the other; the last may be cut off."""
        lesson = self._teacher.lesson()
        while len(lesson) < num_tokens:
            self._add(lesson, rng)
        return lesson

    def _add(self, lesson: Lesson, rng: random.Random) -> None:
        lesson.control(BEGIN, 0.0)
        if rng.random() < 0.25:
            lesson.control(SYSTEM, 0.0).add(rng.choice(SYSTEM_TEXTS), FACT).control(END, 0.0)
        shares, draws = zip(*self._kinds, strict=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            for user, reply, weight in rng.choices(draws, shares)[0](rng):
                lesson.control(USER, 0.0).add(user, FACT).control(END, 0.0).control(ASSISTANT, 0.0)
                lesson.add(reply, weight).control(END)

    def _about_book(self, rng: random.Random) -> list[Turn]:
        book = rng.choice(self._books)
        title, author, year = book.title, book.author, book.year
        asked = rng.choice(("who", "who", "when", "when", "what", "about"))
        if asked == "who":
            question = rng.choice(
                ("Who wrote {}?", "Who wrote the book {}?", "Who is the author of {}?", "Who was {} written by?")
            )
            return [(question.format(title), f"{title} was written by {author}.", KNOWN)]
        if asked == "when":
            question = rng.choice(("When was {} published?", "When was {} written?", "In which year was {} published?"))
            return [(question.format(title), f"{title} was first published in {year}.", KNOWN)]
        if asked == "what":
            titles = sorted({other.title for other in self._books if other.author == author})
            question = rng.choice(("What did {} write?", "Name a book by {}.", "Which book did {} write?"))
            return [(question.format(author), f"{author} wrote {rng.choice(titles)}.", KNOWN)]
        question = rng.choice(("Tell me about {}.", "What is {}?", "Tell me about the book {}."))
        return [(question.format(title), f"{title} is a book by {author}, first published in {year}.", KNOWN)]

    def _passage(self, rng: random.Random) -> list[Turn]:
        """The next paragraphs of a text."""
        parts = [self._teacher.decode(part).strip() for part in self._teacher.paragraphs(400, rng)]
        if len(parts) < 2:
            return _fixed(rng)
        middle = rng.randint(1, min(3, len(parts) - 1))
        question = rng.choice(
            ("Continue this passage:", "Continue this text:", "Continue:", "Go on with this story:", "What comes next?")
        )
        reply = "\n\n".join(parts[middle : middle + 3])
        return [(f"{question}\n\n" + "\n\n".join(parts[:middle]), reply, TEXT)]

    def _story(self, rng: random.Random) -> list[Turn]:
        parts = [self._teacher.decode(part).strip() for part in self._teacher.paragraphs(300, rng)]
        parts = [part for part in parts if len(part.split()) > 12][:2]
        if not parts:
            return _fixed(rng)
        asked = rng.choice(("Tell me a story.", "Write a story.", "Write a short story.", "Tell me something."))
        words = [word for word in parts[0].split() if word in TRAINING_WORDS[::3] and len(word) > 4]
        if words and rng.random() < 0.6:
            question = rng.choice(("Tell me a story about {}.", "Write a story about {}.", "Write about {}."))
            asked = question.format(rng.choice(words))
        return [(asked, "\n\n".join(parts), TEXT)]


def _word(rng: random.Random) -> str:
    return rng.choice(TRAINING_WORDS)


def _repeat(rng: random.Random) -> list[Turn]:
    words = rng.sample(TRAINING_WORDS, rng.randint(1, 12))
    kind = rng.random()
    if kind < 0.5:
        asked = rng.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Repeat these words: {}", "Say {}"))
        return [(asked.format(" ".join(words)), " ".join(words), ANSWER)]
    if kind < 0.75:
        which, place = rng.choice((("first", 0), ("last", -1)))
        return [
            (f"What is the {which} word of: {' '.join(words)}?", f"The {which} word is {words[place]}.", KNOWN),
        ]
    at = rng.randrange(max(1, len(words) - 1))
    if len(words) < 2:
        return _repeat(rng)
    asked = f"Which word comes after {words[at]} in: {' '.join(words)}?"
    return [(asked, f"The word after {words[at]} is {words[at + 1]}.", KNOWN)]


def _count(rng: random.Random) -> list[Turn]:
    kind = rng.random()
    if kind < 0.6:
        low = rng.choice((1, 1, rng.randint(0, 90)))
        numbers = [str(number) for number in range(low, low + rng.randint(2, 12))]
        if rng.random() < 0.25:
            numbers.reverse()
            return [(f"Count down from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers) + ".", KNOWN)]
        asked = rng.choice(("Count from {} to {}.", "Count from {} to {}", "Please count from {} to {}."))
        if numbers[0] == "1" and rng.random() < 0.4:
            asked = "Count to {1}."
        return [(asked.format(numbers[0], numbers[-1]), ", ".join(numbers) + ".", KNOWN)]
    words = rng.sample(TRAINING_WORDS, rng.randint(1, 10))
    there = "There is one word." if len(words) == 1 else f"There are {NUMBERS[len(words)]} words."
    return [(f"How many words are in this list: {', '.join(words)}?", there, KNOWN)]


def _arithmetic(rng: random.Random) -> list[Turn]:
    left, right = rng.randint(0, rng.choice((10, 20, 99))), rng.randint(0, rng.choice((10, 20, 99)))
    kind = rng.random()
    if kind < 0.45:
        sign, word, result = "+", "plus", left + right
    elif kind < 0.75:
        left, right = max(left, right), min(left, right)
        sign, word, result = "-", "minus", left - right
    else:
        left, right = rng.randint(0, 12), rng.randint(0, 12)
        sign, word, result = "*", "times", left * right
    asked = rng.choice((f"What is {left} {sign} {right}?", f"What is {left} {word} {right}?", f"{left} {sign} {right}"))
    return [(asked, f"{left} {sign} {right} = {result}.", ANSWER)]


def _fixed(rng: random.Random) -> list[Turn]:
    questions, reply = rng.choice(FIXED)
    return [(rng.choice(questions), reply, TEXT)]


def _unknown(rng: random.Random) -> list[Turn]:
    return [(rng.choice(OPEN_QUESTIONS).format(_word(rng), _word(rng)), UNKNOWN, TEXT)]


def _told(rng: random.Random) -> list[Turn]:
    """Facts in one turn, or in several, and questions about them later."""
    pairs = [(name, code(rng)) for name in rng.sample(TRAINING_WORDS, rng.randint(1, 5))]
    needles = [task_parts.code_needle(*pair) for pair in pairs]
    turns: list[Turn] = []
    if rng.random() < 0.5:
        turns.append((" ".join(needles), "I will remember that.", FRAME))
    else:
        turns += [(needle, "I will remember that.", FRAME) for needle in needles]
    if rng.random() < 0.3:
        turns += _fixed(rng)
    asked: list[Parts] = [code_question(*pair) for pair in rng.sample(pairs, min(2, len(pairs)))]
    if len(pairs) > 2 and rng.random() < 0.4:
        asked = [query_question(pairs[:-1])]
    if rng.random() < 0.4:
        first = asked[0]
        return [(" ".join(needles) + " " + chat_question(first), reply_text(first), KNOWN)]
    return [*turns, *((chat_question(parts), reply_text(parts), KNOWN) for parts in asked)]


def _name(rng: random.Random) -> list[Turn]:
    name = _word(rng).capitalize()
    told = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hello, my name is {}."))
    return [
        (told.format(name), f"Hello, {name}! What can I do for you?", FRAME),
        (rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}.", KNOWN),
    ]
