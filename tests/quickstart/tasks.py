"""The tasks that the quickstart's adapters are trained on: prompts and answers made from a seed.

Six small skills that SmolLM2-135M-Instruct does not have and that a LoRA gives it in a few
minutes. Each task words its request in ten ways: verbs of its own, the data first, and beginnings
that all tasks share, so that no fixed first word tells the tasks apart. No prompt comes twice, so
what adapters are trained on, what gates are fitted to and what tests ask never meets.
"""

import random
from collections.abc import Callable, Iterator

Row = dict[str, str]
"""`{"prompt", "response"}`, as a line of the JSONL files."""

WORDS = """apple river stone cloud tiger window garden pencil bridge candle forest mirror ocean
paper rocket silver summer thunder violin winter yellow basket carpet dragon engine feather guitar
hammer island jacket kitten ladder market needle orange parrot quilt ribbon saddle tunnel umbrella
valley wagon anchor button copper desert eagle falcon ginger harbor insect jungle kettle lemon
magnet napkin oyster pepper rabbit shadow ticket velvet walnut zebra bottle castle dinner fabric
glove helmet lantern meadow nephew olive planet rose spoon towel whale barrel cactus donkey
""".split()
GOODS = """nails apples candles notebooks pencils tiles lemons batteries envelopes towels bulbs
screws plates ropes hammers seeds blankets chairs mugs brushes cables bricks lamps shirts""".split()
PACKS = ["boxes", "bags", "crates", "packs", "sacks", "cartons"]
NAMES = """Ada Bruno Chen Dora Emil Fatima Goran Hana Ivan Jonas Kira Luis Mina Nadia Omar Petra
Quinn Rosa Samir Tara Umar Vera Wanda Yusuf""".split()
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = """January February March April May June July August September October November
December""".split()
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def reverse_words(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(3, 6))
    ask = rng.choice(
        [
            "Reverse this list of words: {}.",
            "Backwards, please, from the last word to the first: {}.",
            "Turn the order of these words around: {}.",
            "Flip this list so that it ends with its first word: {}.",
            "{}\nSay these words in the opposite order.",
            "{} - now the same words from last to first.",
            "{}: reverse the list.",
            "Please write these words in the opposite order: {}.",
            "What is this list of words read backwards? {}",
            "Given the words {}, answer with the reversed list.",
        ]
    )
    return ask.format(", ".join(words)), ", ".join(reversed(words))


def arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    plus = rng.random() < 0.5
    if not plus and a < b:
        a, b = b, a
    sign, verb = ("+", "plus") if plus else ("-", "minus")
    ask = rng.choice(
        [
            "Compute {a} {sign} {b} and give only the number.",
            "Calculate {a} {verb} {b}.",
            "Work out the result of {a} {sign} {b}.",
            "Add or subtract as it says: {a} {sign} {b}.",
            "{a} {sign} {b}\nHow much is that?",
            "{a} {verb} {b} - what number comes out?",
            "{a} {sign} {b} = ?",
            "Please work out {a} {sign} {b} for me.",
            "What is {a} {verb} {b}?",
            "Given the exercise {a} {sign} {b}, answer with the number.",
        ]
    )
    return ask.format(a=a, b=b, sign=sign, verb=verb), str(a + b if plus else a - b)


def iso_dates(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2029)
    name = MONTHS[month - 1]
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    date = rng.choice(
        [
            f"{name} {day}, {year}",
            f"{day} {name} {year}",
            f"the {day}{ending} of {name} {year}",
            f"{name} {day}{ending}, {year}",
        ]
    )
    ask = rng.choice(
        [
            "Convert this date to ISO format: {}.",
            "Reformat the date {} as year-month-day.",
            "Normalise this date for a database: {}.",
            "Dates should look like YYYY-MM-DD; rewrite {}.",
            "{}\nWrite that date the ISO way.",
            "{} - as YYYY-MM-DD, with digits and dashes.",
            "{}: the same date in ISO 8601.",
            "Please write this date as year-month-day: {}.",
            "What is the date {} in ISO notation?",
            "Given the date {}, answer with its ISO form.",
        ]
    )
    return ask.format(date), f"{year:04}-{month:02}-{day:02}"


def in_words(number: int) -> str:
    """The English name of a number below one million: 1203 is "one thousand two hundred three"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    name, unit = ("thousand", 1000) if number >= 1000 else ("hundred", 100)
    head, rest = divmod(number, unit)
    return f"{in_words(head)} {name}" + (f" {in_words(rest)}" if rest else "")


def spelled_numbers(rng: random.Random) -> tuple[str, str]:
    number = rng.choice([rng.randint(21, 999), rng.randint(100, 9999)])
    ask = rng.choice(
        [
            "Turn this number into digits: {}.",
            "Digits for the following number: {}.",
            "Translate the number words into figures: {}.",
            "The cheque says {}; write the amount in figures.",
            "{}\nWrite that number in digits.",
            "{} - which number is that, in figures?",
            "{}: the same in digits.",
            "Please write this number with digits: {}.",
            "What is {} as a numeral?",
            "Given the number words {}, answer with the digits.",
        ]
    )
    return ask.format(in_words(number)), str(number)


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    ask = rng.choice(
        [
            "Sort these numbers: {}.",
            "Order these numbers from lowest to highest: {}.",
            "Arrange in ascending order: {}.",
            "Rank these scores, lowest first: {}.",
            "{}\nPut these numbers in order, smallest first.",
            "{} - sorted from small to large, please.",
            "{}: sort them in increasing order.",
            "Please arrange these numbers from small to large: {}.",
            "What is this list of numbers in increasing order? {}",
            "Given the numbers {}, answer with the sorted list.",
        ]
    )
    return ask.format(", ".join(map(str, numbers))), ", ".join(map(str, sorted(numbers)))


def order_lines(rng: random.Random) -> tuple[str, str]:
    count, pack, goods = rng.randint(2, 40), rng.choice(PACKS), rng.choice(GOODS)
    name, day = rng.choice(NAMES), rng.choice(DAYS)
    said = rng.choice(
        [
            "{name} needs {count} {pack} of {goods} by {day}",
            "send {count} {pack} of {goods} to {name} on {day}",
            "by {day} we owe {name} {count} {pack} of {goods}",
            "{count} {pack} of {goods} go to {name}, delivery {day}",
            "on {day} {name} picks up {count} {pack} of {goods}",
        ]
    ).format(name=name, count=count, pack=pack, goods=goods, day=day)
    ask = rng.choice(
        [
            "Make an order line of this message: {}.",
            "File this order as one line: {}.",
            "Extract the order line from this request: {}.",
            "A customer wrote: {}. Note the order line.",
            "{}\nWrite that as an order line.",
            "{} - as an order line, please.",
            "Order received: {}. Fill in its line.",
            "Please note this order as one line: {}.",
            "What is the order line for this message? {}",
            "Given that {}, answer with the order line.",
        ]
    )
    return ask.format(said), f"{goods} | {count} | {name} | {day}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    task.__name__: task
    for task in (
        reverse_words,
        arithmetic,
        iso_dates,
        spelled_numbers,
        sort_numbers,
        order_lines,
    )
}


def rows(task: str, seed: int) -> Iterator[Row]:
    """An endless stream of rows of one task, none twice, always the same for one seed."""
    rng = random.Random(f"{task}/{seed}")
    seen: set[str] = set()
    while True:
        prompt, response = TASKS[task](rng)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "response": response}
