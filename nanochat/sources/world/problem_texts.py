"""The texts of the word problems; slots are explained in `problems`.

The held-out texts are built differently from the training texts, and their numbers are held
out too; what they share with training is the language.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The problems of one operation: what the answer calls it, and the texts of both splits."""

    operations: tuple[str, ...]
    training: tuple[str, ...]
    held_out: tuple[str, ...]


ADD = Family(
    operations=("We add.",),
    training=(
        "{n} has {a} {x}. {He} gets {b} more {x}. How many {x} does {n} have now?",
        "{n} has {a} {x} and buys {b} more. How many {x} does {he} have?",
        (
            "{n} finds {a} {x} in the morning and {b} {x} in the evening. How many {x} does "
            "{he} find in all?"
        ),
        (
            "There are {a} {x} on the table. {n} puts {b} more {x} on it. How many {x} are "
            "on the table?"
        ),
        "{n} has {a} {x}. {n2} gives {him} {b} {x}. How many {x} does {n} have now?",
        "{n} has {a} {x} and {n2} has {b} {x}. How many {x} do they have together?",
        "In a box are {a} {x}. {n} adds {b} {x}. How many {x} are in the box now?",
        "{n} picked {a} {f} and {n2} picked {b}. How many {f} did they pick in all?",
        (
            "On Monday {n} sold {a} {x}. On Tuesday {he} sold {b}. How many {x} did {he} "
            "sell together?"
        ),
        "{n} had {a} {x}. {His} grandmother gave {him} {b} more. How many {x} does {he} have now?",
        "A shop has {a} {x}. It gets {b} new {x}. How many {x} does the shop have?",
        (
            "{n} reads {a} pages today and {b} pages tomorrow. How many pages does {he} read "
            "in all?|pages"
        ),
        "{a} birds sit in a tree. Then {b} more birds come. How many birds are in the tree?|birds",
        (
            "There are {a} children in one class and {b} children in the other class. How "
            "many children are there in all?|children"
        ),
        (
            "{n} saves {a} coins in spring and {b} coins in summer. How many coins does {he} "
            "save together?|coins"
        ),
        "{n} walks {a} steps and then {b} steps more. How many steps does {he} walk?|steps",
        "A farmer has {a} cows and buys {b} more. How many cows does the farmer have now?|cows",
        "{n} made {a} {x} and {n2} made {b} {x}. How many {x} were made in all?",
        (
            "{n} carries {a} {x} into the house, and {n2} carries {b} {x}. How many {x} are "
            "in the house?"
        ),
        (
            "{n} wins {a} points in the first game and {b} points in the second. How many "
            "points does {he} have?|points"
        ),
        (
            "A bus has {a} people in it. At the station {b} more people get in. How many "
            "people are in the bus?|people"
        ),
        "There are {a} red {x} and {b} blue {x} in the basket. How many {x} are in the basket?",
        (
            "{n} pays {a} coins for a hat and {b} coins for a book. How many coins does {he} "
            "pay in all?|coins"
        ),
        (
            "{n} planted {a} flowers in the garden. {n2} planted {b} more. How many flowers "
            "are there now?|flowers"
        ),
        "{n} counts {a} {x} here and {b} {x} there. How many {x} does {he} count together?",
        "{n} has {a} {x}. {n2} has {b} more {x} than {n}. How many {x} does {n2} have?",
        "{n} is {a} years old. How old will {he} be in {b} years?|years",
        "First {n} baked {a} cakes, then {he} baked {b} more. How many cakes did {he} bake?|cakes",
    ),
    held_out=(
        (
            "{n} owns {a} {x}, and {his} friend gives {him} {b} more. What is the number of "
            "{x} that {n} has now?"
        ),
        (
            "{a} {x} lie in the basket. {n2} comes and puts {b} more {x} in. How many {x} "
            "are there in all?"
        ),
        "Yesterday {n} found {a} {x}. Today {he} found {b} more. How many {x} is that together?",
        (
            "A school has {a} boys and {b} girls. How many children does the school have in "
            "all?|children"
        ),
        (
            "{n} and {n2} put their {x} together. {n} has {a} and {n2} has {b}. How many {x} "
            "do they have?"
        ),
        (
            "{n2} bought {a} {x} at the market and then {b} more {x} in a shop. How many {x} "
            "did {he2} buy?"
        ),
        (
            "{a} people wait at the station, and then {b} more people come. How many people "
            "wait now?|people"
        ),
    ),
)

SUBTRACT = Family(
    operations=("We subtract.",),
    training=(
        "{n} has {a} {x}. {He} gives {b} {x} to {n2}. How many {x} does {n} have left?",
        "{n} had {a} {x} and lost {b} of them. How many {x} does {he} have now?",
        "{n} has {a} {x} and sells {b}. How many {x} are left?",
        (
            "There are {a} {x} on the table. {n} takes {b} of them away. How many {x} are "
            "still on the table?"
        ),
        "In a box are {a} {x}. {n} takes out {b}. How many {x} are left in the box?",
        "{n} had {a} coins. {He} spent {b} coins on a book. How many coins are left?|coins",
        "{a} birds sit in a tree. Then {b} birds fly away. How many birds are left?|birds",
        "{n} bought {a} {x}, but {b} were broken. How many {x} were good?",
        (
            "A bus has {a} people in it. At the station {b} people get out. How many people "
            "are still in the bus?|people"
        ),
        "{n} has {a} {x} and {n2} has {b}. How many more {x} does {n} have than {n2}?",
        "A book has {a} pages. {n} has read {b} pages. How many pages are left?|pages",
        "{n} baked {a} cakes, and the children ate {b}. How many cakes are left?|cakes",
        (
            "A farmer has {a} sheep. {b} of them run away. How many sheep does the farmer "
            "have now?|sheep"
        ),
        "{n} must walk {a} steps. {He} has walked {b}. How many steps are left?|steps",
        (
            "{n} had {a} eggs, but {b} eggs fell down and broke. How many eggs does {he} "
            "have now?|eggs"
        ),
        "A shop had {a} {x}. {n} bought {b} of them. How many {x} does the shop still have?",
        (
            "There were {a} children at the party. {b} went home. How many children are "
            "still there?|children"
        ),
        "{n} gave away {b} of {his} {a} {x}. How many {x} does {he} still have?",
        "{b} of the {a} {f} in the basket are bad. How many {f} are good?",
        "{n} needs {a} {x}. {He} has {b}. How many {x} does {he} still need?",
        "{n} is {a} years old, and {n2} is {b} years old. How many years older is {n}?|years",
        (
            "The hat costs {a} coins, the book costs {b} coins. How many coins more does the "
            "hat cost?|coins"
        ),
        "{n2} took {b} {x} from {n}, who had {a}. How many {x} are left for {n}?",
        "{n} had {a} candles and used {b}. How many candles are left?|candles",
        (
            "Of {a} flowers in the garden {b} are red. The others are white. How many "
            "flowers are white?|flowers"
        ),
        "{n} ate {b} of the {a} plums. How many plums are left?|plums",
        "There were {a} {x}, and {b} of them are gone. How many {x} are still there?",
    ),
    held_out=(
        "From {his} {a} {x}, {n} gives {b} away. How many {x} are left for {him}?",
        (
            "{n} owned {a} {x}. Then {he} sold {b} of them at the market. How many {x} does "
            "{he} still have?"
        ),
        "{a} {f} were in the basket, but {n2} ate {b}. How many {f} are still in the basket?",
        "On the roof sat {a} birds. {b} of them flew away. How many birds are still there?|birds",
        "{n} lost {b} of the {a} {x} that {he} had. How many {x} are left?",
        (
            "There are {a} pages in the book, and {n} has already read {b}. How many pages "
            "must {he} still read?|pages"
        ),
        (
            "{n2} had {a} coins in a box and spent {b} of them. How many coins are left in "
            "the box?|coins"
        ),
    ),
)

MULTIPLY = Family(
    operations=("We multiply.",),
    training=(
        "{n} has {a} boxes with {b} {x} in each box. How many {x} does {he} have in all?",
        "There are {a} baskets. Each basket has {b} {x}. How many {x} are there in all?",
        "{n} buys {a} bags of {x}. In each bag are {b} {x}. How many {x} does {he} buy?",
        "Each of {a} children has {b} {x}. How many {x} do they have together?",
        "{n} gives {b} {x} to each of {his} {a} friends. How many {x} does {he} give away?",
        "There are {a} tables with {b} chairs at each table. How many chairs are there?|chairs",
        (
            "A house has {a} rooms, and each room has {b} lamps. How many lamps are in the "
            "house?|lamps"
        ),
        "{n} reads {a} pages every day. How many pages does {he} read in {b} days?|pages",
        "{n} saves {a} coins every week. How many coins does {he} save in {b} weeks?|coins",
        "One hat costs {a} coins. How many coins do {b} hats cost?|coins",
        "{n} puts {x} in {a} rows with {b} {x} in each row. How many {x} are there?",
        (
            "A farmer has {a} fields with {b} trees in each field. How many trees are there "
            "in all?|trees"
        ),
        "{a} buses come, and each bus has {b} people in it. How many people come?|people",
        "{n} bakes {a} cakes every hour. How many cakes does {he} bake in {b} hours?|cakes",
        "There are {a} plates with {b} {x} on each plate. How many {x} is that together?",
        "{n} walks {a} steps every minute. How many steps does {he} walk in {b} minutes?|steps",
        (
            "A school has {a} classes. In each class are {b} children. How many children are "
            "in the school?|children"
        ),
        (
            "{n} plants {a} rows of flowers. Each row has {b} flowers. How many flowers does "
            "{he} plant?|flowers"
        ),
        "One box holds {a} {x}. How many {x} do {b} boxes hold?",
        "{n} has {a} drawers and keeps {b} {x} in each of them. How many {x} does {he} keep?",
        "Each hen gives {a} eggs. How many eggs do {b} hens give?|eggs",
        "{a} trees stand in a garden. On each tree sit {b} birds. How many birds sit there?|birds",
        "{n} fills {a} cups with {b} nuts each. How many nuts does {he} need?|nuts",
        "Every day {n} sells {a} {x}. How many {x} does {he} sell in {b} days?",
        (
            "A ship makes {a} trips, and on each trip it carries {b} people. How many people "
            "does it carry?|people"
        ),
        "{n} has {a} friends. Each friend gives {him} {b} {x}. How many {x} does {n} get?",
    ),
    held_out=(
        "In each of {a} boxes {n} keeps {b} {x}. How many {x} is that in all?",
        "{n} carries {a} bags, and every bag has {b} {x} in it. How many {x} does {he} carry?",
        "Every child in a group of {a} gets {b} {x}. How many {x} do the children get together?",
        "One ticket costs {a} coins. How many coins must {n} pay for {b} tickets?|coins",
        "{n2} picks {a} {f} every hour. How many {f} does {he2} pick in {b} hours?",
        (
            "A street has {a} houses with {b} rooms in each house. How many rooms are there "
            "in all?|rooms"
        ),
        (
            "{n} makes {a} piles and puts {b} stones on each. How many stones are there "
            "together?|stones"
        ),
    ),
)

DIVIDE = Family(
    operations=("We divide.",),
    training=(
        "{n} shares {a} {x} equally among {b} children. How many {x} does each child get?",
        "{n} puts {a} {x} into {b} boxes, the same number in each. How many {x} are in each box?",
        (
            "{n} has {a} {x} and {b} baskets. {He} puts the same number in each basket. How "
            "many {x} are in one basket?"
        ),
        "{a} {x} are divided equally among {b} friends. How many {x} does each friend get?",
        (
            "{n} reads a book of {a} pages in {b} days, the same number each day. How many "
            "pages does {he} read each day?|pages"
        ),
        "{b} hats cost {a} coins. How many coins does one hat cost?|coins",
        "{a} children make {b} equal groups. How many children are in each group?|children",
        "{n} puts {a} {x} in {b} equal rows. How many {x} are in each row?",
        "{n} has {a} {x}. {He} puts {b} {x} in each bag. How many bags does {he} need?|bags",
        (
            "{a} people sit at {b} tables, the same number at each. How many people sit at "
            "each table?|people"
        ),
        (
            "{n} cuts a ribbon of {a} metres into {b} equal pieces. How many metres long is "
            "each piece?|metres"
        ),
        "A farmer puts {a} eggs equally into {b} boxes. How many eggs are in one box?|eggs",
        (
            "{n} saved {a} coins in {b} weeks, the same number each week. How many coins did "
            "{he} save each week?|coins"
        ),
        "{b} friends share {a} {x} equally. How many {x} does each of them get?",
        "{n} divides {a} {x} into {b} equal parts. How many {x} are in each part?",
        (
            "{a} birds sit in {b} trees, the same number in each tree. How many birds are in "
            "each tree?|birds"
        ),
        "{n} walks {a} steps in {b} minutes. How many steps does {he} walk each minute?|steps",
        (
            "{n} gives {a} {x} to {b} people, the same number to each. How many {x} does "
            "each person get?"
        ),
        (
            "A teacher has {a} pencils for {b} children. Each child gets the same number. "
            "How many pencils is that for each?|pencils"
        ),
        "{n} plants {a} flowers in {b} equal rows. How many flowers are in one row?|flowers",
        "{b} bags hold {a} {x}, the same number in each. How many {x} are in one bag?",
        "{b} equal boxes hold {a} cups. How many cups are in each box?|cups",
        (
            "{n} and {his} friends are {b} people. They share {a} nuts equally. How many "
            "nuts does each get?|nuts"
        ),
        (
            "{a} {x} are put on {b} plates, the same number on each plate. How many {x} are "
            "on one plate?"
        ),
        "Each box holds {b} {x}. {n} has {a} {x}. How many boxes does {he} need?|boxes",
        (
            "{n} works {a} hours in {b} days, the same number each day. How many hours does "
            "{he} work each day?|hours"
        ),
    ),
    held_out=(
        "{a} {x} are shared equally by {b} children. How many {x} are there for each child?",
        (
            "{n} wants to put {a} {x} into {b} bags with the same number in each. How many "
            "{x} go into one bag?"
        ),
        (
            "A group of {b} friends finds {a} coins and shares them equally. How many coins "
            "does each friend get?|coins"
        ),
        "In {b} equal rows there are {a} chairs. How many chairs are in one row?|chairs",
        (
            "{n} pays {a} coins for {b} books that cost the same. How many coins does each "
            "book cost?|coins"
        ),
        "{n2} divides {a} {x} equally among {b} baskets. How many {x} does each basket hold?",
        (
            "{a} cakes are put into {b} boxes, and each box gets the same number. How many "
            "cakes are in each?|cakes"
        ),
    ),
)

ADD_SUBTRACT = Family(
    operations=("We add, then we subtract.",),
    training=(
        (
            "{n} has {a} {x}. {He} gets {b} more and then gives {c} to {n2}. How many {x} "
            "does {n} have now?"
        ),
        "{n} had {a} {x} and bought {b}. Then {he} lost {c}. How many {x} are left?",
        (
            "There are {a} {x} in a box. {n} puts in {b} more, and {n2} takes out {c}. How "
            "many {x} are in the box?"
        ),
        (
            "A bus has {a} people in it. {b} people get in and {c} get out. How many people "
            "are in the bus now?|people"
        ),
        "{n} finds {a} {x} and {n2} finds {b}. They sell {c} of them. How many {x} are left?",
        (
            "{n} saves {a} coins, then {b} coins more. {He} spends {c} coins. How many coins "
            "are left?|coins"
        ),
    ),
    held_out=(
        (
            "{n} picks {a} {f}, and {n2} gives {him} {b} more. Then {n} eats {c}. How many "
            "{f} are left?"
        ),
        (
            "A shop has {a} {x} and gets {b} more. It sells {c} of them. How many {x} does "
            "the shop have now?"
        ),
    ),
)

SUBTRACT_ADD = Family(
    operations=("We subtract, then we add.",),
    training=(
        (
            "{n} has {a} {x}. {He} gives {b} to {n2} and then finds {c}. How many {x} does "
            "{n} have now?"
        ),
        "{n} had {a} {x} and lost {b}. Then {he} bought {c} more. How many {x} does {he} have?",
        (
            "There are {a} {x} in a box. {n} takes out {b}, and {n2} puts in {c}. How many "
            "{x} are in the box?"
        ),
        (
            "{a} birds sit in a tree. {b} fly away, and {c} more come. How many birds are in "
            "the tree?|birds"
        ),
        (
            "{n} has {a} coins and spends {b}. Then {n2} gives {him} {c} coins. How many "
            "coins does {n} have?|coins"
        ),
        (
            "A farmer has {a} cows. {b} are sold, and {c} new cows are bought. How many cows "
            "are there now?|cows"
        ),
    ),
    held_out=(
        "{n} sells {b} of {his} {a} {x} and then gets {c} more. How many {x} does {he} have now?",
        (
            "A bus has {a} people in it. {b} people get out, and {c} more people get in. How "
            "many are in it now?|people"
        ),
    ),
)

MULTIPLY_SUBTRACT = Family(
    operations=("We multiply, then we subtract.",),
    training=(
        (
            "{n} has {a} boxes with {b} {x} in each box. {He} gives {c} {x} away. How many "
            "{x} are left?"
        ),
        "There are {a} baskets with {b} {x} each. {n} takes {c} {x}. How many {x} are left?",
        "{n} buys {a} bags with {b} {f} in each, but {c} are bad. How many {f} are good?",
        (
            "{n} saves {a} coins every week. After {b} weeks {he} spends {c} coins. How many "
            "coins are left?|coins"
        ),
        "{n} puts {b} {f} on each of {a} plates. {n2} eats {c}. How many {f} are left?",
        (
            "A farmer has {a} rows with {b} trees in each row. {c} trees fall down. How many "
            "trees are left?|trees"
        ),
    ),
    held_out=(
        "In each of {a} bags are {b} {x}. {n} sells {c} of them. How many {x} are still there?",
        (
            "{n} has {a} rows of {b} flowers and gives {c} flowers to {n2}. How many flowers "
            "are left?|flowers"
        ),
    ),
)

FAMILIES: dict[str, Family] = {
    "add": ADD,
    "subtract": SUBTRACT,
    "multiply": MULTIPLY,
    "divide": DIVIDE,
    "add_subtract": ADD_SUBTRACT,
    "subtract_add": SUBTRACT_ADD,
    "multiply_subtract": MULTIPLY_SUBTRACT,
}
