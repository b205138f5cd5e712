"""Plots about journeys, animals, quarrels and work; see `plots`."""

from nanochat.sources.world.plots import Plot

RUNAWAY_PET: Plot = (
    (
        "{n2} had a {coat} {pet} that liked to run.",
        "In the barn of {n2} lived a {coat} {pet}.",
        "{n2} took care of an old {pet}.",
    ),
    (
        "{time}, the gate was open, and the {pet} ran away.",
        "{time}, somebody left the door open, so the {pet} got out.",
        "{time}, there was a loud noise, and the {pet} ran away because it was afraid.",
    ),
    (
        "{n2} called and called, but the {pet} did not come back.",
        "{n2} ran after it, but the {pet} was faster.",
        "{n2} was very worried and asked all the neighbours.",
    ),
    (
        "{n} heard about it and went to look {outside}.",
        '{n} said, "I will help you," and took some {food} with {him}.',
        "{n} had seen the {pet} {outside}.",
    ),
    (
        "There was the {pet}, cold and hungry.",
        "{He} saw the {pet} behind a tree.",
        "The {pet} stood there and did not know the way home.",
    ),
    (
        "{n} spoke to it with a soft voice and gave it something to eat.",
        "{n} waited until the {pet} came near, and then {he} took it by the neck.",
        "{He} put {his} scarf around its neck and led it home.",
    ),
    (
        "{n2} was so glad that {he2} cried.",
        "{n2} thanked {n} and gave {him} a {thing}.",
        '"You found my {pet}!" said {n2}. "How can I thank you?"',
    ),
    (
        "Since that day the gate is always closed.",
        "After that, {n} came every day to visit the {pet}.",
        "",
    ),
)

QUARREL: Plot = (
    (
        "{n} and {n2} were friends, but {time_low} they had a quarrel.",
        "{time}, {n} and {n2} both wanted the {colour} {thing}.",
        "There was only one {thing}, and both {n} and {n2} wanted it.",
    ),
    (
        '"It is mine!" said {n}. "No, it is mine!" said {n2}.',
        "{n} pulled on one side, and {n2} pulled on the other.",
        "They shouted at each other, and then they did not speak any more.",
    ),
    (
        "{n} went home and was angry.",
        "{n} sat alone {place} and did not feel well.",
        "In the evening {n} could not sleep because {he} thought about {n2}.",
    ),
    (
        '"A friend is more important than a {thing}," {he} thought.',
        '{His} mother said, "Go and talk to your friend."',
        "{He} understood that {he} had been wrong.",
    ),
    (
        'The next day {he} went to {n2} and said, "I am sorry."',
        'So {he} gave the {thing} to {n2} and said, "You can have it."',
        "So {he} wrote a letter to {n2} and said that {he} was sorry.",
    ),
    (
        '"I am sorry too," said {n2}.',
        "{n2} smiled and gave {him} {his2} hand.",
        "{n2} was happy because {he2} had missed {n}.",
    ),
    (
        "From then on they shared the {thing}.",
        "Now {n} has the {thing} in the morning and {n2} has it in the evening.",
        "They played together again as before.",
    ),
)

JOURNEY: Plot = (
    (
        "{n} had never seen the sea.",
        "{n} wanted to visit {n2}, who lived far away.",
        "{n} dreamed of a long journey.",
    ),
    (
        "{time}, {he} packed a bag with {food} and a {thing}.",
        "{time}, {he} took {his} bag and went to the station.",
        "{time}, {he} said goodbye to {his} mother and left the house.",
    ),
    (
        "The train went over bridges and through forests.",
        "First {he} walked, then {he} rode on a cart, and then {he} took a ship.",
        "For {number} days {he} was on the road.",
    ),
    (
        "On the way {he} lost the map and did not know where to go.",
        "At night it was dark and cold, and {he} was a little afraid.",
        "Then a storm came, and the road was full of water.",
    ),
    (
        "An old woman showed {him} the way and gave {him} a cup of tea.",
        "A farmer let {him} sleep in the barn.",
        "{He} asked a sailor, who knew every road, and the sailor helped {him}.",
    ),
    (
        "At last {he} came to the house of {n2}.",
        "In the end {he} stood by the sea, and there was {n2}.",
        "After a long time {he} saw the town where {n2} lived.",
    ),
    (
        '"How good that you are here!" said {n2}.',
        "{n2} ran to meet {him} and carried {his} bag.",
        "{n2} had waited for {him} and had made some {food}.",
    ),
    (
        "They talked all night about what {n} had seen.",
        "{n} stayed {number} weeks, and they were good weeks.",
        '"It was hard," said {n}, "but now I am happy."',
    ),
)

BAKING: Plot = (
    (
        "{n} wanted to bake a cake for {n2}.",
        "{n2} was hungry, so {n} wanted to bake a pie.",
        "{time}, guests were coming, and {n} had to bake.",
    ),
    (
        "{He} needed flour, milk and {number} eggs.",
        "{He} took flour and butter, but there were no eggs in the house.",
        "In the kitchen {he} found flour, but no milk.",
    ),
    (
        "So {he} went to the farmer and bought what was missing.",
        "So {n2} ran to the market and brought the rest.",
        "A neighbour gave {him} the rest.",
    ),
    (
        "{He} mixed everything in a big bowl and put it in the oven.",
        "Then {he} put the {fruit} on top and opened the oven.",
        "{n2} helped {him} and washed the {fruit}.",
    ),
    (
        "But {n} forgot the time, and soon there was smoke in the kitchen.",
        "While the cake was in the oven, {n} read a book and forgot it.",
        "It smelled so good that the {pet} came into the kitchen.",
    ),
    (
        "{He} ran to the oven and took it out just in time.",
        "{n2} smelled it first and opened the oven.",
        '"The cake!" shouted {n2}, and {n} took it out.',
    ),
    (
        "It was a little dark, but it tasted good.",
        "They cut it into {number2} pieces, and everybody got one.",
        '{n2} ate two pieces and said, "This is the best cake of my life."',
    ),
)

RACE: Plot = (
    (
        "Every year there is a race {outside}.",
        "{time}, there was a race {outside}.",
    ),
    (
        "{n2} was the fastest runner in the town and often talked about it.",
        "{n2} always won, so {he2} did not practise any more.",
        "{n2} laughed at {n} because {n} was small.",
    ),
    (
        "{n} was slow at first, but {he} ran every morning before school.",
        "{n} said nothing and practised every day.",
        "{n} wanted to win, so {he} ran up the hill {number} times a day.",
    ),
    (
        "On the day of the race the sun was hot.",
        "Many people came to see the race.",
        "When the bell rang, all the children began to run.",
    ),
    (
        "{n2} ran so fast that {he2} was soon tired.",
        "{n2} looked back, did not see a stone, and fell.",
        "Half way {n2} stopped to drink, because {he2} felt safe.",
    ),
    (
        "{n} did not stop and ran past {him2}.",
        "{n} ran on, step by step, and came first.",
        "{n} saw it, stopped, and helped {him2} up. Then they ran on together.",
    ),
    (
        "Everybody was surprised, and {n} got a {thing} as a prize.",
        "In the end {n} got the prize, {a_colour} {thing}.",
        '"You ran very well," said {n2}. "Next year I will practise too."',
    ),
)

OLD_NEIGHBOUR: Plot = (
    (
        "Next to {n} lived an old man who was often alone.",
        "{n} had an old neighbour who could not walk well.",
        "In a small house {region} lived an old woman, and {n} was her neighbour.",
    ),
    (
        "{time}, {n} and {n2} decided to visit the house.",
        "{time}, {n} saw no light in the window and went over with {n2}.",
        '{time}, {n} asked {n2}, "Shall we help our neighbour?"',
    ),
    (
        "They cleaned the rooms and carried wood into the house.",
        "{n} washed the plates, and {n2} swept the floor with a broom.",
        "{n2} brought {food}, and {n} made a fire.",
    ),
    (
        "Then they sat at the table and heard stories from old times.",
        '"When I was young, I was a sailor," said the neighbour, and told them about the sea.',
        "After the work they drank tea and looked at old pictures.",
    ),
    (
        "The neighbour gave {n} an old {thing}, because {n} liked it so much.",
        "On the table lay an old {thing}, and {n} was allowed to keep it.",
        "",
    ),
    (
        'On the way home {n2} said, "We must come back soon."',
        "Since then they visit the house every week.",
        "It is good to help, and it is good to listen.",
    ),
)

NIGHT_NOISE: Plot = (
    (
        "In the middle of the night {n} heard a noise.",
        "{n} woke up because something moved {hide}.",
        "It was dark, and {n} could not sleep. Then there was a noise.",
    ),
    (
        '"Who is there?" {he} asked, but nobody answered.',
        "{His} heart beat fast, and {he} did not move.",
        "{He} thought of ghosts and was afraid.",
    ),
    (
        "{He} woke {n2}, and {n2} took a lamp.",
        "{He} called {n2}, who was not afraid of the dark.",
        "Then {he} took a lamp and went to {n2}.",
    ),
    (
        "Together they went to look, step by step.",
        "They looked under the table and behind the door.",
        "Slowly they opened the door.",
    ),
    (
        "There sat the {small_pet} and ate the {food}!",
        "It was only the {small_pet}, which had fallen into a basket.",
        "It was the wind that moved an old {thing}.",
    ),
    (
        "They laughed so loudly that the whole house woke up.",
        "{n} laughed, and all the fear was gone.",
        '"You see," said {n2}, "in the light nothing is terrible."',
    ),
    (
        "Then they went back to bed and slept until the morning.",
        "Since then {n} has a lamp beside the bed.",
        "",
    ),
)

BRIDGE: Plot = (
    (
        "The old bridge over the river was broken.",
        "After the storm the bridge was gone.",
        "There was no bridge over the river, and the school was on the other side.",
    ),
    (
        "So {n} and {n2} could not go to school.",
        "{n} wanted to visit {n2}, but {he} could not cross the water.",
        "Nobody could go to the market, and there was no bread in the village.",
    ),
    (
        '"The water is too deep," said {n}.',
        "{n} tried to jump from stone to stone, but {he} fell into the water.",
        "{n} sat down and thought for a long time.",
    ),
    (
        "Then {he} had an idea: they could use the big tree that lay by the river.",
        '"Let us build a new bridge," said {n2}.',
        "{n2} was a carpenter and knew what to do.",
    ),
    (
        "{n} brought wood, and {n2} brought a hammer and nails.",
        "The whole village helped, and everybody carried something.",
        "They worked for {number} days, and they got tired hands.",
    ),
    (
        "In the end the new bridge was strong and wide.",
        "Then the bridge was ready, and it did not move when they walked on it.",
    ),
    (
        "{n} was the first to cross it, and {n2} came after {him}.",
        "They put {a_colour} flag on it and had a feast.",
        "Now the children can go to school again.",
    ),
)

MORE_PLOTS: tuple[Plot, ...] = (
    RUNAWAY_PET,
    QUARREL,
    JOURNEY,
    BAKING,
    RACE,
    OLD_NEIGHBOUR,
    NIGHT_NOISE,
    BRIDGE,
)
