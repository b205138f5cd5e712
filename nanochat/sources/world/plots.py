"""Plots about wishes, losses and gifts: each step of a plot is a tuple of ways to say it.

Slots are explained in `stories`. An empty string leaves the step out.
"""

Plot = tuple[tuple[str, ...], ...]

LOST_THING: Plot = (
    (
        "{n} had {a_colour} {thing} and liked it very much.",
        "{n} loved {his} {size} {colour} {thing}.",
        "The best thing {n} had was {a_colour} {thing}.",
    ),
    (
        "{time}, {he} could not find it.",
        "{time}, the {thing} was gone.",
        "{time}, {he} looked for the {thing}, but it was not there.",
    ),
    (
        "{He} was very sad because the {thing} was a gift from {his} grandmother.",
        "{He} was sad and began to cry.",
        "{He} was worried and did not want to eat.",
    ),
    (
        "{n2} saw that {n} was sad and wanted to help.",
        "{n} asked {n2} for help, and {n2} came at once.",
        '{n2} heard about it and said, "Let us look for it together."',
    ),
    (
        "First they looked {place}, but they found nothing.",
        "They looked {place} for a long time.",
        "They looked in every room, and then {place}.",
        "",
    ),
    (
        "At last {n2} found the {thing} {hide}.",
        "Then {n2} looked {hide}, and there was the {thing}.",
        "{Hide} they saw something {colour}. It was the {thing}!",
    ),
    (
        "{n} was so happy that {he} gave {n2} a big hug.",
        "{n} thanked {n2} because {he2} had helped {him}.",
        '{n} laughed and said, "Thank you, {n2}!"',
    ),
    (
        "From that day on, {he} always put the {thing} back in its place.",
        "After that, {n} took good care of the {thing}.",
        "Now {n} and {n2} are good friends.",
        "",
    ),
)

SAVING_MONEY: Plot = (
    (
        "{n} wanted {a_colour} {thing}, but {he} had no money.",
        "In the shop there was {a_colour} {thing}, and {n} wanted to have it.",
        "{time}, {n} saw {a_colour} {thing} in a shop and wanted to buy it.",
    ),
    (
        "The {thing} cost {number} coins.",
        "It cost {number} coins, and that was too much for {him}.",
    ),
    (
        "So {he} asked {n2} for work.",
        'So {he} went to {n2} and asked, "Can I help you?"',
        '{n2} said, "If you help me, I will pay you."',
    ),
    (
        "Every day {he} carried water and fed the {pet}.",
        "{n} cleaned the barn and gave food to the {pet}.",
        "{n} picked {fruit} {outside} and put them in a basket.",
    ),
    (
        "For the work {n2} gave {him} {number2} coins.",
        "At the end of the week {n2} paid {him} {number2} coins.",
        "{n2} was pleased and gave {him} {number2} coins.",
    ),
    (
        "{n} ran to the shop and bought the {thing}.",
        "Now {n} had enough money, so {he} bought the {thing}.",
        "With the coins {n} bought the {thing}.",
    ),
    (
        "One coin was left, and {he} gave it to {his} little brother.",
        "{He} kept the last coin in a box.",
        "{He} was proud because {he} had worked for it.",
    ),
)

RAIN: Plot = (
    (
        "{time}, {n} and {n2} went for a walk {outside}.",
        "{time}, {n} and {n2} were playing {outside}.",
        "{n} and {n2} wanted to have a picnic {outside}.",
    ),
    (
        "The sky was blue and the sun was warm.",
        "At first the sun was shining.",
        "It was a fine day, so they took no coats.",
    ),
    (
        "Then dark clouds came, and it began to rain.",
        "Soon a strong wind came up, and it rained hard.",
        "Suddenly there was thunder, and rain fell from the sky.",
    ),
    (
        "They had no umbrella, so they got wet.",
        "{n} was cold because {his} coat was at home.",
        "{n2} was wet and cold because {he2} had no hat.",
    ),
    (
        "They ran to an old barn and waited there.",
        "They found a dry place under a big tree and waited.",
        "They ran home as fast as they could.",
    ),
    (
        "{n} shared {his} {food} with {n2}.",
        "{n} told a funny story, and {n2} laughed.",
        '"I am hungry," said {n2}, so {n} gave {him2} some {food}.',
    ),
    (
        "When the rain stopped, they saw a rainbow.",
        "After the rain the air was fresh and the birds sang.",
        "In the evening they sat by the fire and were warm again.",
    ),
)

SICK_PET: Plot = (
    (
        "{n} had a little {pet}.",
        "{n} lived in a house {region} with a {coat} {pet}.",
        "The {pet} of {n} was old and kind.",
    ),
    (
        "{time}, the {pet} did not want to eat.",
        "{time}, the {pet} was sick and lay on the floor.",
        "{time}, the {pet} could not stand up.",
    ),
    (
        "{n} was afraid for the {pet}.",
        "{n} did not know what to do, so {he} went to {n2}.",
        "{n} was worried, so {he} called {n2}.",
    ),
    (
        "{n2} was a doctor for animals, and {he2} came at once.",
        "{n2} knew much about animals.",
        '{n2} looked at the {pet} and said, "It needs rest and warm milk."',
    ),
    (
        "{n2} gave the {pet} some medicine.",
        "They gave the {pet} water and put a warm blanket over it.",
    ),
    (
        "All night {n} sat beside the {pet}.",
        "{n} stayed with the {pet} until the morning.",
        "{n} did not sleep because {he} wanted to take care of the {pet}.",
    ),
    (
        "The next day the {pet} was well again and ate some food.",
        "After two days the {pet} could run again.",
        "In the morning the {pet} opened its eyes and was better.",
    ),
    (
        "{n} was happy and thanked {n2}.",
        "To thank {n2}, {n} gave {him2} a basket of {fruit}.",
        '{n} said, "Thank you, {n2}. You saved my {pet}."',
    ),
)

BIRTHDAY: Plot = (
    (
        "It was the birthday of {n2}, and {n} wanted to give {him2} something.",
        "{n2} had a birthday, so {n} looked for a gift.",
        "Tomorrow was the birthday of {n2}, but {n} had no gift.",
    ),
    (
        "{n} knew that {n2} liked {colour} things.",
        "{n2} had always wanted a {thing}.",
        "{n} thought about it all day.",
    ),
    (
        "So {n} made {a_colour} {thing} with {his} own hands.",
        "So {n} went to the market and bought {a_colour} {thing}.",
        "At last {he} found a {size} {colour} {thing} in a shop.",
    ),
    (
        "{He} also baked a cake and put {number} candles on it.",
        "{He} put it in a box and tied a ribbon around it.",
        "",
    ),
    (
        "When {n2} opened the door, {n} gave {him2} the {thing}.",
        "At the party {n} gave the {thing} to {n2}.",
        "{n2} opened the box and saw the {thing}.",
    ),
    (
        "{n2} was surprised and very happy.",
        '"It is beautiful," said {n2}. "Thank you, {n}!"',
        "{n2} smiled because it was just what {he2} wanted.",
    ),
    (
        "Then they ate {food} and sang songs.",
        "They played until the evening.",
        "It was a good day for both of them.",
    ),
)

BROKEN_THING: Plot = (
    (
        "{n} borrowed a {thing} from {n2}.",
        "{n2} gave {n} {a_colour} {thing} to play with.",
        "{time}, {n} played with the {thing} of {n2}.",
    ),
    (
        "{He} was not careful, and the {thing} fell and broke.",
        "The {thing} fell on a stone and broke.",
        "{He} ran too fast and dropped the {thing}, so it broke.",
    ),
    (
        "{n} was afraid that {n2} would be angry.",
        "At first {he} wanted to hide the {thing} {hide}.",
        "{n} felt bad and did not know what to do.",
    ),
    (
        "But {he} went to {n2} and told {him2} the truth.",
        'Then {he} said to {n2}, "I am sorry. I broke your {thing}."',
        "But it is better to be honest, so {he} told {n2} what had happened.",
    ),
    (
        "{n2} was not angry, because {n} had told the truth.",
        "{n2} was sad for a moment, but then {he2} smiled.",
        '"You are honest," said {n2}. "That is more important than a {thing}."',
    ),
    (
        "Together they repaired the {thing} with some glue.",
        "They took it to the carpenter, and he repaired it.",
        "They made a new {thing}, and it was even better than the old one.",
    ),
    (
        "They stayed good friends.",
        "After that, {n} was more careful.",
        "",
    ),
)

SEEDS: Plot = (
    (
        "In spring {n} found {number} seeds {hide}.",
        '{n2} gave {n} {number} seeds and said, "Put them in the ground."',
        "{n} wanted to have a garden, so {he} bought some seeds.",
    ),
    (
        "{He} dug a hole with a spade and put the seeds in the ground.",
        "{n} planted the seeds {outside}.",
    ),
    (
        "Every day {he} gave them water.",
        "{He} gave the seeds water every morning.",
        "When it was dry, {he} carried water from the well.",
    ),
    (
        "For a long time nothing happened.",
        "{He} waited and waited, but {he} saw only brown earth.",
        '"Why does nothing grow?" asked {n}. "You must wait," said {n2}.',
    ),
    (
        "Then the sun was warm, and small green leaves came out of the ground.",
        "After two weeks the first green leaves came up.",
        "Then it rained, and because of the rain the plants began to grow.",
    ),
    (
        "In summer there were {colour} flowers.",
        "In autumn there were many {fruit} in the garden of {n}.",
        "The plants were soon as high as a table.",
    ),
    (
        "{n} gave the most beautiful flower to {n2}.",
        "{n} and {n2} sat in the garden and were happy.",
        "{n} learned that good things need time.",
    ),
)

NEW_SKILL: Plot = (
    (
        "{n} could not swim, but {he} wanted to learn it.",
        "{n} wanted to learn to ride a horse.",
        "{n} wanted to play the drum, but {he} did not know how.",
        "{n} was afraid of the water and could not swim.",
    ),
    (
        '{n2} said, "I will show you how."',
        "{n2} could do it well, so {n} asked {him2} for help.",
        "{time}, {n2} began to teach {him}.",
    ),
    (
        "The first day was hard, and {n} wanted to stop.",
        "At first it did not work at all.",
        "In the first hour {n} made many mistakes.",
    ),
    (
        '"Try again," said {n2}. "Nobody learns it in one day."',
        "But {n2} was patient and showed it again and again.",
        "{n} was tired, but {he} tried once more.",
    ),
    (
        "They practised every day after school.",
        "{n} practised {number} days.",
        "Day after day it went a little better.",
    ),
    (
        "In the end {n} could do it alone.",
        "Then, one morning, it worked, and {n} shouted for joy.",
    ),
    (
        "{n} was proud, and {n2} was proud of {him}.",
        '"You see," said {n2}, "those who practise will learn."',
        "Now {n} teaches it to {his} little sister.",
    ),
)

PLOTS: tuple[Plot, ...] = (
    LOST_THING,
    SAVING_MONEY,
    RAIN,
    SICK_PET,
    BIRTHDAY,
    BROKEN_THING,
    SEEDS,
    NEW_SKILL,
)
