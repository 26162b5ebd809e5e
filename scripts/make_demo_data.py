"""Writes the demo tasks: four small tasks with held-out tests that a model of a few million parameters can learn.

    python scripts/make_demo_data.py            writes src/tsugiki/assets/demo/TASK/{train,test}.jsonl
    python scripts/make_demo_data.py --check    exits 1 if a committed file differs from what would be written

Every task is enumerated whole and put in the order of a keyed hash, so the rows do not depend on the Python version.
Test rows are chosen first; what would give them away (the other order of a sum, say) never reaches train.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import string
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

SEED = 20
OUT = Path(__file__).resolve().parents[1] / "src" / "tsugiki" / "assets" / "demo"
Row = tuple[str, str]                # (prompt, completion)
Split = tuple[list[Row], list[Row]]  # (train, test)


def shuffled(items: Iterable, purpose: str) -> list:
    """The items in an order fixed by (SEED, purpose) and each item's own text."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED}/{purpose}/{item!r}".encode()).digest())


def words(text: str) -> list[str]:
    """The entries of a list written with bars."""
    return [entry.strip() for entry in text.split("|")]


# ---- record -> sentence: the sentence is a function of the record, so exact match measures it

PEOPLE = words("""Mary | Tom | Jane | George | Alice | Henry | Miss Grey | Mr. Brown | Mrs. Wood | Captain Hall |
    Doctor Moore | Lady Anne | the old man | the young girl | the soldier | the boy""")
PLACES = words("""the old mill | the church | the river | the garden | the farm | the station | the village |
    the bridge | the castle | the school | the market | the wood | the sea | the inn | the hill | the town""")
DAYS = words("Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday")
HOURS = words("morning | afternoon | evening | night")
WEATHER = {"rain": ("in the rain", "ran"), "snow": ("through the snow", "walked"), "sun": ("in the sun", "went"),
           "fog": ("through the fog", "crept"), "frost": ("in the frost", "drove"),
           "wind": ("against the wind", "rode")}


def record_row(person: str, place: str, day: str, hour: str, weather: str) -> Row:
    how, verb = WEATHER[weather]
    return (f"name: {person} | place: {place} | time: {day} {hour} | weather: {weather}\nSentence:",
            f" On {day} {hour}, {how}, {person} {verb} to {place}.")


def record(train: int = 1600, test: int = 160) -> Split:
    records = shuffled(itertools.product(PEOPLE, PLACES, DAYS, HOURS, WEATHER), "record")
    rows = [record_row(*values) for values in records[: train + test]]
    return rows[test:], rows[:test]


# ---- request -> intent: a template grammar of a household

SLOTS = {name: words(entries) for name, entries in {
    "ask": "| please | would you | will you | you must | kindly | pray",
    "person": "my brother | my mother | Mr. Brown | the doctor | my aunt | Mary | the lawyer | my cousin | the cook |"
              "Tom | my sister | the captain | Lady Anne | my wife",
    "city": "London | Paris | York | Bath | Oxford | Rome | Dover | Bristol | Edinburgh | Cambridge | Leeds |"
            "Brighton | Venice | Boston",
    "day": "today | to-morrow | on Monday | on Tuesday | on Wednesday | on Friday | this evening | this afternoon |"
           "on Sunday | next week | to-night",
    "hour": "six | seven | eight | five | half past six | half past seven | nine | four | a quarter to eight | ten |"
            "eleven",
    "food": "bread | butter | tea | sugar | milk | coffee | salt | beef | flour | fish | eggs | apples | wine | honey |"
            "cheese | soap | candles | coal",
    "amount": "some | two pounds of | plenty of | a basket of | more | a box of",
    "tune": "song | waltz | hymn | march | ballad | dance | tune | sonata | psalm",
    "player": "piano | violin | organ | harp | fiddle | flute",
    "mood": "merry | sad | quiet | gay | grave | French | slow | lively | soft",
    "sky": "rain | snow | be fine | be cold | freeze | be windy | be wet | be warm | clear | be hot",
    "news": "dinner is ready | I am ill | I shall be late | the house is sold | the money has come | we are all well |"
            "the train is late | it will rain to-morrow | I have found the key | the baby is asleep |"
            "I want some bread | the concert was good",
    "ride": "train | coach | boat | carriage | steamer | waggon",
    "task": "catch the train | feed the horses | light the fire | go to church | see the doctor | bake the bread |"
            "meet the coach | write a letter",
}.items()}
FRESH = {name: words(entries) for name, entries in {      # these stand in test rows alone
    "person": "my father | the vicar | my uncle | Henry",
    "city": "Dublin | Vienna | Lisbon | Florence",
    "day": "on Thursday | on Saturday | this morning",
    "hour": "half past five | a quarter past six | noon",
    "food": "oranges | bacon | mutton | paper | potatoes",
    "amount": "half a pound of | a bag of",
    "tune": "melody | polka | chorus",
    "player": "guitar | trumpet",
    "mood": "sweet | German | tender",
    "sky": "thaw | hail | be foggy | be dry",
    "news": "I am married | the horse is lame | I cannot come | the snow is deep",
    "ride": "ship | cab | ferry",
    "task": "go to the market | take my medicine | milk the cow",
}.items()}
PATTERNS = {label: words(entries) for label, entries in {
    "weather": """will it {sky} {day} | do you think it will {sky} {day} | is it going to {sky} in {city} |
        will it {sky} in {city} {day} | what will the sky be like in {city} {day} | is it likely to {sky} {day} |
        shall I want an umbrella {day} | how cold is it in {city} {day} | is the sun shining in {city} |
        {ask} tell me if it will {sky} {day} | is there a storm coming {day} | is the wind still blowing in {city} |
        should I wear a warm coat in {city} {day}""",
    "alarm": """{ask} wake me at {hour} | {ask} wake me at {hour} {day} | {ask} call me at {hour} so that I can {task} |
        I must be up by {hour} {day} | {ask} ring the bell at {hour} | do not let me sleep after {hour} |
        {ask} set the clock for {hour} | get me out of bed at {hour} {day} | I have to rise at {hour} to {task} |
        {ask} rouse me before {hour} {day} | I want to be awake by {hour} to {task}""",
    "music": """{ask} play a {mood} {tune} | {ask} play me a {tune} on the {player} | let us have a {mood} {tune} |
        I should like to hear the {player} {day} | {ask} sing us a {mood} {tune} | strike up a {tune} |
        give us a {tune} on the {player} {day} | let me hear that {mood} {tune} again | can you play the {player} |
        {ask} sing the {tune} that {person} loves | I am in the mood for a {mood} {tune}""",
    "shopping": """{ask} buy {amount} {food} | we need {amount} {food} {day} |
        {ask} order {amount} {food} for {person} | put {food} on the list |
        we have no {food} left in the house | {ask} get {amount} {food} at the shop |
        we have run out of {food} | {ask} send to the grocer for {amount} {food} | what is the price of {food} |
        I want to buy {amount} {food} {day} | {ask} fetch {amount} {food} and {food2} from the market""",
    "message": """{ask} tell {person} that {news} | {ask} send word to {person} that {news} |
        say to {person} that {news} | {ask} write to {person} and say that {news} |
        {ask} give {person} a note saying that {news} |
        let {person} know that {news} | {ask} answer the letter from {person} {day} | has {person} written to me |
        send a telegram to {person} in {city} | {ask} inform {person} that {news} |
        I must write a few lines to {person} {day}""",
    "travel": """when does the {ride} to {city} leave | {ask} take two seats in the {ride} to {city} |
        I want to go to {city} {day} | how far is it to {city} | is there a {ride} to {city} {day} |
        {ask} find me a {ride} for {city} {day} | how do I get from {city} to {city2} | what is the fare to {city} |
        {ask} order a {ride} at {hour} | how long does the {ride} take to reach {city} |
        we are leaving for {city} by {ride} {day} | which road goes to {city}""",
}.items()}


def expansions(pattern: str, fresh: bool) -> list[str]:
    """All texts of a pattern: from seen words alone, or (fresh) with at least one word that train never shows."""
    names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name]
    seen = [SLOTS[name.removesuffix("2")] for name in names]
    new = [FRESH.get(name.removesuffix("2"), []) for name in names]
    texts = []
    for entries in itertools.product(*([*old, *added] if fresh else old for old, added in zip(seen, new, strict=True))):
        values = dict(zip(names, entries, strict=True))
        repeated = any(values.get(name + "2") == entry for name, entry in values.items())     # from York to York
        if not repeated and fresh == any(entry in added for entry, added in zip(entries, new, strict=True)):
            texts.append(pattern.format(**values).strip())
    return texts


def interleaved(lists: list[list[str]]) -> list[str]:
    """One from each list in turn until all are empty."""
    return [item for group in itertools.zip_longest(*lists) for item in group if item is not None]


def intent(train: int = 1500, test: int = 180) -> Split:
    """Labels equally often, patterns as equally as their expansions allow; half of test holds unseen words."""
    rows: Split = ([], [])
    num_train, num_test = train // len(PATTERNS), test // len(PATTERNS)
    for label, patterns in PATTERNS.items():
        seen = interleaved([shuffled(expansions(pattern, fresh=False), "intent") for pattern in patterns])
        fresh = interleaved([shuffled(expansions(pattern, fresh=True), "intent-fresh") for pattern in patterns])
        tests = fresh[: num_test // 2] + shuffled(seen, "intent-test")[: num_test - num_test // 2]
        trains = [text for text in seen if text not in set(tests)][:num_train]
        for split, texts in zip(rows, (trains, tests), strict=True):
            split += [(f"Request: {text}\nIntent:", f" {label}") for text in texts]
    return shuffled(rows[0], "intent-order"), shuffled(rows[1], "intent-order")


# ---- arithmetic in words: sums without a carry, so unseen ones follow from the digits; whole families are held out

UNITS = words("zero | one | two | three | four | five | six | seven | eight | nine")
TENS = words("| ten | twenty | thirty | forty | fifty | sixty | seventy | eighty | ninety")


def spelt(number: int) -> str:
    """forty seven; without the hyphen, so that a unit is the same token wherever it stands."""
    ten, unit = divmod(number, 10)
    return f"{TENS[ten]} {UNITS[unit]}" if ten and unit else TENS[ten] or UNITS[unit]


def family_rows(a: int, b: int) -> list[Row]:
    """The family of a + b: both sums and both differences, each once."""
    sums = [f"{spelt(x)} plus {spelt(y)} equals" for x, y in dict.fromkeys([(a, b), (b, a)])]
    differences = [f"{spelt(a + b)} minus {spelt(x)} equals" for x in dict.fromkeys([a, b])]
    return ([(prompt, f" {spelt(a + b)}") for prompt in sums]
            + [(prompt, f" {spelt(a + b - x)}") for prompt, x in zip(differences, dict.fromkeys([a, b]), strict=True)])


def arithmetic(train: int = 2000, test: int = 160) -> Split:
    """Small sums (all numbers up to ten) are always shown; held out are families of larger numbers."""
    numbers = [n for n in range(100) if not 10 < n < 20]                           # the teens have irregular names
    families = [(a, b) for a in numbers for b in numbers
                if a <= b and a % 10 + b % 10 < 10 and a + b in numbers or a <= b and a + b == 10]
    small = [family for family in families if sum(family) <= 10]
    large = shuffled([family for family in families if 0 < family[0] and sum(family) > 20], "arithmetic")
    tests = [row for a, b in large[: test // 4 + 1] for row in family_rows(a, b)][:test]
    shown = [row for a, b in small + large[test // 4 + 1:] for row in family_rows(a, b)][:train]
    return shuffled(shown, "arithmetic-order"), shuffled(tests, "arithmetic-order")


# ---- present -> past tense of a short sentence

SUBJECTS = words("""The old man | The girl | My brother | The captain | She | He | The servant | Her mother |
    The doctor | The boy | Mary | The young lady | Mr. Brown | The stranger""")
VERBS = {  # present/past: what may follow
    "walks/walked goes/went runs/ran comes/came rides/rode":
        "to the house | to the church | along the road | down the hill | into the garden",
    "opens/opened shuts/shut leaves/left finds/found sees/saw": "the door | the window | the room | the gate",
    "takes/took holds/held loses/lost brings/brought hides/hid": "the letter | the book | the money | the key",
    "loves/loved knows/knew meets/met follows/followed hears/heard": "the child | the woman | his friend | the king",
    "sits/sat stands/stood waits/waited sings/sang sleeps/slept":
        "by the fire | at the door | in the hall | near the river",
}


def past(train: int = 1200, test: int = 150) -> Split:
    rows = []
    for verbs, tails in VERBS.items():
        for subject, verb, tail in itertools.product(SUBJECTS, verbs.split(), words(tails)):
            now, then = verb.split("/")
            rows.append((f"Present: {subject} {now} {tail}.\nPast:", f" {subject} {then} {tail}."))
    rows = shuffled(rows, "past")
    return rows[test: test + train], rows[:test]


# ---- writing and checking

TASKS: dict[str, Callable[[], Split]] = {"record": record, "intent": intent, "arithmetic": arithmetic, "past": past}


def build() -> dict[str, str]:
    """Relative path -> text of every demo file; raises if a test prompt is also a train prompt."""
    files = {}
    for task, make in TASKS.items():
        train, test = make()
        shared = {prompt for prompt, _ in train} & {prompt for prompt, _ in test}
        assert not shared, f"{task}: {len(shared)} test prompts are in train, {sorted(shared)[0]!r} for one"
        for split, rows in (("train", train), ("test", test)):
            assert len({prompt for prompt, _ in rows}) == len(rows), f"{task}/{split}: a prompt twice"
            lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
            files[f"{task}/{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def stale(folder: Path = OUT) -> list[str]:
    """One line for every file of the folder that differs from a fresh build, is missing, or should not be there."""
    files = build()
    present = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jsonl")}
    wrong = [f"{name}: missing" for name in files if name not in present]
    wrong += [f"{name}: not made by this script" for name in present if name not in files]
    return wrong + [f"{name}: differs" for name in files if name in present and present[name] != files[name].encode()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files there; write nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the tasks (default: the package's assets)")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = stale(options.out)
        print("\n".join(wrong) or "demo data is up to date")
        return 1 if wrong else 0
    for name, text in build().items():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        print(f"{name}: {text.count(chr(10))} rows, {len(text.encode()) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
