"""Words that tasks make keys, topics and lists from."""

from __future__ import annotations

import random


def _listed(text: str) -> list[str]:
    return [" ".join(part.split()) for part in (text.split(",") if "," in text else text.split())]


ADJECTIVES = _listed(
    """
    amber ancient brave bright calm careful clever cold crimson curious distant eager early fancy gentle gloomy
    golden grand hollow humble icy jolly keen lazy lively lucky mellow misty modest narrow noble odd pale patient
    plain polite proud quiet rapid rare rough round rustic sandy sharp shiny silent silver simple sleepy smooth
    solid stormy strange sturdy sunny swift tender tidy tiny vast velvet warm wild windy wise wooden young
    """
)
NOUNS = _listed(
    """
    anchor apple arrow badge basket beacon bell bottle branch bridge bucket butter button cabin camel candle canyon
    carpet castle cattle chapel cherry circle clock cloud coffee copper cotton cradle desert dragon drum eagle
    engine falcon feather fence field forest fountain garden glacier goat guitar hammer harbor helmet honey island
    jacket kettle kitchen ladder lantern lemon letter lion marble market meadow mirror monkey mountain needle ocean
    orchard oven paddle palace parrot pebble pencil pepper piano pillow planet pocket potato quarry rabbit ribbon
    river rocket saddle salmon shadow shelter shovel silk spider spoon stable statue stone sugar table temple
    thunder ticket tiger tower tractor tunnel turtle valley village violin wagon walnut whale wheel window winter
    wolf
    """
)
TOPICS = _listed(
    """
    the history of bread, growing tomatoes at home, the rings of Saturn, learning to swim, medieval castles, keeping
    bees, the rules of chess, volcanoes in Iceland, repairing bicycles, the invention of paper, raising a puppy,
    jazz piano, ocean tides, making cheese, the silk road, solar panels, watercolor painting, marathon training,
    coral reefs, the printing press, folk dances, steam engines, bird migration, desert plants, wooden boats, the
    human heart, ancient Rome, stage magic, coffee roasting, mountain rescue, glass blowing, deep sea fish, the
    violin, city parks, snow storms, train travel, pottery, honey badgers, sign language, lighthouses, fermented
    food, the moon landing, street photography, rice farming, polar bears, opera singers, knitting patterns, radio
    astronomy, tropical fruit, firefighters, rock climbing, old maps, the theory of colors, garden birds, wind
    turbines, puppet theater, hot springs, public libraries, crossword puzzles, river dams
    """
)


def keys(rng: random.Random, count: int) -> list[str]:
    """`count` different keys of two words, "amber anchor"."""
    picked = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]} {NOUNS[n % len(NOUNS)]}" for n in picked]


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """`count` different numbers of equally many digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def coined(rng: random.Random, count: int) -> list[str]:
    """`count` different words that mean nothing, three syllables each."""
    found: set[str] = set()
    made: list[str] = []
    while len(made) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in found:
            found.add(word)
            made.append(word)
    return made
