"""Word problems to practise on: other texts than those that are taught and those that are tested.

Nobody shows the model how to solve these; it is only told whether its answer was right. Slots are
explained in `problems`.
"""

ADD = (
    "{n} owned {a} {x} and was given {b} more. How many {x} does {he} own now?",
    "Together, {n} and {n2} own {x}: {a} are from {n}, {b} are from {n2}. How many {x} is that?",
    "{n} and {n2} use one box. {n} puts in {a} {x}, {n2} puts in {b}. How many {x} are in it?",
    "In the garden stand {a} old trees. {n} plants {b} new ones. How many trees stand there?|trees",
    "{a} guests came early and {b} guests came late. How many guests came?|guests",
    "Last week {n} read {a} pages. This week {he} read {b}. How many pages did {he} read?|pages",
    "What do {n} and {n2} have together, if {n} has {a} {x} and {n2} has {b} {x}?",
    "One bag holds {a} {f}, another bag holds {b} {f}. How many {f} do both bags hold?",
    "{n} bought {b} {x}. Before that {he} had {a}. What is the number of {x} that {he} has now?",
    "After {n} found {b} {x}, {he} put them to the {a} that {he} had. How many {x} is that in all?",
    "{a} men and {b} women work in a mill. How many people work there?|people",
    "A hen house had {a} hens, and {b} more were brought. How many hens are there now?|hens",
    "{n} joins {his} {a} {x} with the {b} {x} of {n2}. How many {x} do the two have?",
    "In spring {n2} sold {a} {x}, in autumn {b}. How many {x} did {he2} sell in all?",
)
SUBTRACT = (
    "{n} dropped {b} of {his} {a} {x} in the river. How many {x} does {he} still have?",
    "Out of {a} {x}, {n} gave {b} to {n2}. How many {x} did {n} keep?",
    "{n2} carried {a} {f} home, but {b} fell out of the bag. How many {f} came home?",
    "There were {a} guests. At night {b} of them left. How many guests stayed?|guests",
    "From a box of {a} {x}, {n} sold {b}. How many {x} stayed in the box?",
    "A wall has {a} stones. {b} stones fall down. How many stones are still in the wall?|stones",
    "{n} wants to read {a} pages and has read {b} already. How many pages must {he} read?|pages",
    "{b} of {a} lamps are dark. How many lamps are bright?|lamps",
    "{n} lost {b} {x}. Before that {he} had {a}. How many {x} does {n} have now?",
    "On a branch sat {a} birds, until {b} of them flew off. How many birds sit there now?|birds",
    "{n} had {a} coins. A hat cost {him} {b} of them. How many coins does {he} still have?|coins",
    "{n2} has eaten {b} of the {a} {f} on the table. How many {f} are still there?",
    "A train had {a} seats, and {b} were taken. How many seats were free?|seats",
    "Of the {a} {x} that {n} had, {b} were stolen. How many {x} were left to {him}?",
)
MULTIPLY = (
    "Every one of {a} bags that {n} has holds {b} {x}. How many {x} does {n} have?",
    "In all {a} rooms of a house stand {b} chairs each. How many chairs stand in the house?|chairs",
    "A team of {a} players gets {b} {x} for every player. How many {x} does the team get?",
    "Every pupil in a class of {a} brings {b} {x}. How many {x} do they bring together?",
    "A ticket costs {a} coins. {n} buys {b} tickets. How many coins is that?|coins",
    "{n} works {a} hours every day. How many hours is that in {b} days?|hours",
    "{a} men carry {b} {x} each. How many {x} do the men carry in all?",
    "{n} has {a} shelves, and on every shelf stand {b} books. How many books are there?|books",
    "A garden has {a} rows of {b} flowers. How many flowers does the garden have?|flowers",
    "{n} sets {a} tables with {b} plates each. How many plates does {he} need?|plates",
    "In {a} nests lie {b} eggs each. How many eggs are that together?|eggs",
    "{n2} fills {a} baskets, {b} {f} in every one. How many {f} did {he2} pick?",
    "Each of the {a} shops in a street sells {b} {x}. How many {x} do they sell?",
    "A cart goes {a} times and takes {b} stones every time. How many stones does it take?|stones",
)
DIVIDE = (
    "{n} gives {b} children {a} {x}, all the same number. How many {x} are there for each child?",
    "Among {b} friends {n} divides {a} coins equally. How many coins does one friend get?|coins",
    "In {b} equal bags are {a} {x}. How many {x} does every bag hold?",
    "{a} pupils sit in {b} equal rows. How many pupils sit in one row?|pupils",
    "{n} pays {a} coins for {b} tickets. How many coins does one ticket cost?|coins",
    "{a} {f} go into {b} baskets, and every basket gets the same number. How many go into one?",
    "A rope of {a} metres is cut into {b} equal parts. How long is one part in metres?|metres",
    "{n} wants to put {a} books on {b} shelves, equally many on each. How many on one?|books",
    "{b} men share a load of {a} stones equally. How many stones does one man carry?|stones",
    "With {a} wheels {n2} builds carts of {b} wheels each. How many carts does {he2} build?|carts",
    "{n} packs {a} {x}, {b} in every box. How many boxes does {he} fill?|boxes",
    "A group of {b} people earns {a} coins and shares equally. What does each person get?|coins",
    "{a} eggs come from {b} hens, the same number from each. How many eggs are from one hen?|eggs",
    "Every child gets the same part of {a} nuts; there are {b} children. How many for each?|nuts",
)
ADD_SUBTRACT = (
    "{n} owned {a} {x}, found {b} more and sold {c}. How many {x} does {he} have left?",
    "{a} guests were there, {b} came and {c} went. How many guests are there now?|guests",
    "A mill has {a} sacks and gets {b} more. {c} sacks are sold. How many sacks are left?|sacks",
    "To {his} {a} {f} {n} adds {b}. Then {n2} takes {c}. How many {f} are there now?",
    "In a train sit {a} people. {b} get in, then {c} get out. How many sit in it now?|people",
    "{n2} bakes {a} cakes, then {b} cakes more, and gives away {c}. How many are left?|cakes",
)
SUBTRACT_ADD = (
    "{n} gave away {b} of {his} {a} {x} and then got {c}. How many {x} does {he} have now?",
    "In a train sit {a} people. {b} get out, then {c} get in. How many sit in it now?|people",
    "A mill has {a} sacks. {b} are sold and {c} new ones come. How many sacks are there?|sacks",
    "{n} eats {b} of {a} {f}, and {n2} brings {c} more. How many {f} are there now?",
    "{a} guests were there. {b} went home and {c} more came. How many guests are there?|guests",
    "{n} lost {b} of {a} {x}, and later {he} bought {c} more. How many {x} does {he} own?",
)
MULTIPLY_SUBTRACT = (
    "Of {a} rows with {b} flowers, {c} flowers are cut. How many flowers stand there?|flowers",
    "In all {a} boxes of {n} are {b} {x}. {He} sells {c} {x}. How many {x} does {he} keep?",
    "{n} fills {a} baskets with {b} {f} each and then eats {c}. How many {f} are there still?",
    "{n2} has {a} bags of {b} {x} and gives {c} {x} to {n}. How many {x} does {n2} have left?",
    "In each of {a} nests lay {b} eggs, but {c} eggs broke. How many eggs are whole?|eggs",
    "{a} buses with {b} people each arrive, and {c} people leave. How many stay?|people",
)

PRACTICE: dict[str, tuple[str, ...]] = {
    "add": ADD,
    "subtract": SUBTRACT,
    "multiply": MULTIPLY,
    "divide": DIVIDE,
    "add_subtract": ADD_SUBTRACT,
    "subtract_add": SUBTRACT_ADD,
    "multiply_subtract": MULTIPLY_SUBTRACT,
}
