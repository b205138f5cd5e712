"""Common English words for spelling and letter counting, in alphabetical order per line group."""

WORDS = """
able about above accept accident account across action active actor actual adult advice afraid
afternoon again against agree ahead airplane alarm alive allow almost alone along aloud already
also always amount ancient anger angle angry animal ankle annoy another answer anthill anybody
anyone anything apart apple apron area argue around arrive arrow artist asleep attack attic aunt
autumn avenue average avoid awake award aware away awful baby back bacon badge bake baker bakery
balance balcony ball balloon bamboo banana band bandage bank banner bargain bark barn barrel base
basic basin basket bath battle beach bead beam bean bear beard beast beat beauty beaver become bed
bedroom bee beef beetle before begin behave behind believe bell belong below belt bench bend berry
beside best better between beyond bicycle big bird birth birthday biscuit bite bitter black blade
blame blank blanket blaze bless blind block blood blossom blow blue board boat body boil bold bone
bonus book boot border bored borrow boss bottle bottom bounce bowl box branch brass brave bread
break breakfast breath breathe breeze brick bride bridge brief bright bring broad broken bronze
brook broom brother brown brush bubble bucket buckle build builder building bullet bunch bundle
burn burrow bury bush business busy butcher butter butterfly button cabbage cabin cable cactus
cage cake calendar calf call calm camel camera camp canal candle candy canoe canvas capital captain
card care careful carpet carriage carrot carry cart carve case castle catch caterpillar cattle
cause cave ceiling celebrate cellar cement centre century certain chain chair chalk chamber champion
chance change channel chapter charge charm chase cheap check cheek cheer cheerful cheese cherry
chess chest chestnut chick chicken chief child chimney chin chocolate choice choose church circle
circus citizen city clap class classroom clay clean clear clerk clever cliff climb clock close
cloth clothes cloud clover clown club coach coal coast coat cobweb coconut coffee coin cold collar
collect college colour column comb come comfort common company compare compass complete concert
cook cookie cool copper copy coral corn corner correct cost cotton couch cough count country
couple courage course court cousin cover cowboy crab crack cradle crane crash crayon crazy cream
create creature creek crew cricket crime crisp crocodile crop cross crowd crown cruel crumb cry
crystal cube cuckoo cucumber cup cupboard curious curl curly current curtain curve cushion custom
customer cycle daily dairy daisy damage damp dance dancer danger dare dark date daughter dawn day
deaf deal dear debt decide deck deep deer defend degree delay delicious deliver dentist depend
desert deserve desk dessert detail devil diamond diary dictionary differ difficult dig dinner
dinosaur direct dirt dirty discover dish distance ditch dive divide doctor dog doll dollar dolphin
donkey door double doubt dove down dozen drag dragon drain draw drawer drawing dream dress drift
drink drive driver drop drum dry duck dull dust dusty duty dwarf eager eagle early earn earth
earthquake easily east easy echo edge effort egg eight either elbow elder elephant eleven empty
enemy engine engineer enjoy enough enter entrance envelope equal escape even evening event every
evil exact example excuse exercise exit expect expensive expert explain explore express extra eye
fable face fact factory fair fairy faith fall false fame family famous fan fancy farm farmer
fashion fast fasten father fault favour fear feast feather feed feel fellow fence fern ferry fetch
fever field fierce fig fight figure fill film find fine finger finish fire fireman fireplace firm
first fish fisherman fist flag flame flash flat flavour fleet flesh flight float flock flood floor
flour flow flower flute fly foam fog fold follow food fool foot football forehead foreign forest
forever forget forgive fork form fortune forward fossil fountain fox frame free freedom freeze
fresh friend frighten frog front frost frown frozen fruit fry fuel full fun funny fur furniture
future gain gallop game garage garden gardener garlic gate gather general gentle gentleman ghost
giant gift giraffe girl give glad glance glass gleam globe glory glove glow glue goal goat gold
golden good goose gorilla gossip govern grab grace grain grammar grand grandfather grandmother
grape graph grass grateful grave gravel gray great green greet grey grief grill grin grind grip
ground group grow growl guard guess guest guide guitar gull habit hail hair half hall hammer
hammock hamster hand handle handsome hang happen happy harbour hard harm harp harvest haste hat
hatch hate hawk hay head heal health heap hear heart heat heaven heavy hedge heel height helmet
help helpful hen herb herd hero hidden hide high hill hint hippo history hobby hold hole holiday
hollow holy home honest honey honour hood hoof hook hope horn horse hospital hotel hour house
hover however huge human humble hungry hunt hunter hurry hurt husband hut icicle idea ideal idle
imagine important inch indeed infant ink insect inside instead invent invite iron island ivory
jacket jail jam jar jaw jealous jelly jewel job join joke journey joy judge juice jump jungle just
kangaroo keen keep kennel kettle key kick kind king kingdom kiss kitchen kite kitten knee kneel
knife knight knit knock knot know label labour lace ladder lady lake lamb lamp land language
lantern large last late laugh laundry law lawn lawyer lazy lead leader leaf leak lean leap learn
least leather leave lecture left lemon lend length leopard less lesson letter lettuce level lever
library lie life lift light lightning lily limb lime limit line lion lip liquid list listen litter
little live liver lizard load loaf loan lobster local lock log lonely long look loose lord lose
lot loud love lovely low loyal luck lucky luggage lumber lunch lung machine magic magnet maid mail
main major make mammal manage mango manner map maple marble march mark market marry marsh mask
mass master match material matter mayor maze meadow meal mean measure meat medal medicine medium
meet melon melt member memory mend mental mention menu merchant mercy merry message metal method
middle midnight mighty mild mile milk mill million mind mine mineral minute mirror miss mist
mistake mix mixture moan model modern moment money monkey monster month mood moon moral morning
mosquito moss moth mother motion motor mountain mouse mouth move movie mud muffin mule muscle
museum mushroom music musician mustard mystery nail name napkin narrow nasty nation native nature
naughty navy near neat neck needle neighbour neither nephew nerve nest net never new news
newspaper next nice niece night nightmare nine noble nobody noise noon normal north nose note
nothing notice novel number nurse nut oak oar oats obey object ocean octopus odd offer office
officer often oil old olive onion only open opera opinion orange orbit orchard orchestra order
organ orphan ostrich other otter outside oven over owl owner oyster pack package paddle page pail
pain paint painter painting pair palace pale palm pan panda panic pansy panther paper parade
parcel pardon parent park parrot parsley part partner party pass passage passenger past paste
pasture patch path patience patient pattern pause paw pay peace peach peacock peak peanut pear
pearl peasant pebble peel pen pencil penguin penny people pepper perfect perform perfume perhaps
period permit person pet phone photo phrase piano picnic picture piece pigeon pile pill pillow
pilot pin pine pineapple pink pioneer pipe pirate pit pitch pity place plain plan planet plank
plant plastic plate platform play player pleasant please pleasure plenty plough plum plunge pocket
poem poet point poison pole police polite pond pony pool poor poppy popular porch pork port
position possible post poster pot potato pottery pouch pour powder power praise pray prayer
precious prefer prepare present press pretend pretty prevent price pride priest prince princess
print prison private prize problem proceed produce professor program promise proof proper protect
proud prove provide public pudding puddle pull pump pumpkin punish pupil puppet puppy pure purple
purpose purse push puzzle pyramid quality quarrel quarter queen question quick quiet quilt quite
rabbit raccoon race rack radio rail railway rain rainbow raise rake ranch range rapid rare
raspberry rather raven raw ray reach read ready real really reason receive recipe record red reed
refuse region regret regular rejoice remain remember remind remove rent repair repeat reply report
reptile request rescue respect rest restaurant result return reward ribbon rice rich riddle ride
rider right ring ripe rise risk river road roar roast rob robber robin robot rock rocket roll roof
room rooster root rope rose rotten rough round route row royal rub rubber rude rug ruin rule ruler
run rush rust sack sad saddle safe safety sail sailor salad salmon salt same sand sandal sandwich
satin satisfy sauce saucer sausage save saw scale scare scarf scene scent school science scissors
scold score scout scrape scratch scream screen screw sea seal search season seat second secret
secretary seed seek seem sell send sense sentence separate serious servant serve seven several
severe sew shade shadow shake shallow shame shape share shark sharp shave shed sheep sheet shelf
shell shelter shepherd shine ship shirt shock shoe shoot shop shore short shoulder shout shovel
show shower shrimp shut sick side sight sign signal silence silent silk silly silver simple since
sing singer single sink sister six skate skeleton sketch ski skill skin skirt skull sky slave
sleep sleeve slice slide slim slip slipper slope slow small smart smell smile smoke smooth snail
snake sneeze snow soap soccer society sock soft soil soldier solid some song soon sorrow sort soul
sound soup sour south space spade spark sparrow speak spear special speech speed spell spend spice
spider spill spin spirit splash spoil sponge spoon sport spot spray spread spring sprout square
squeeze squirrel stable stadium staff stage stair stamp stand star stare start state station
statue stay steady steak steal steam steel steep stem step stick stiff still sting stir stitch
stocking stomach stone stool stop store storm story stove straight strange stranger straw
strawberry stream street strength stretch string stripe strong student study stupid style subject
succeed success sudden suffer sugar suggest suit suitcase sum summer summit sun sunflower sunny
sunrise sunset super supper supply support suppose sure surface surprise swallow swamp swan swear
sweat sweater sweep sweet swift swim swing switch sword syrup system table tail tailor take tale
talent talk tall tame tank tap tape target task taste taxi tea teach teacher team tear tease
teeth telephone telescope temper temple ten tennis tent term terrible test thank theatre thick
thief thin thing think thirsty thorn thousand thread three throat throne through throw thumb
thunder ticket tidy tie tiger tight timber time tiny tired title toast today toe together tomato
tomorrow tongue tonight tool tooth top torch tortoise total touch tough tour towel tower town toy
track trade traffic trail train travel traveller tray treasure treat tree tremble triangle trick
trip trouble trousers truck true trumpet trunk trust truth tube tulip tunnel turkey turn turnip
turtle twelve twenty twice twig twin twist two ugly umbrella uncle under understand unicorn
uniform unit until upper upset upstairs useful usual valley value van vanish vase vegetable veil
velvet verse very vessel village vine vinegar violet violin visit visitor voice volcano vote voyage
wagon waist wait waiter wake walk wall wallet walnut wander want war warm warn wash wasp waste watch
water waterfall wave wax way weak wealth weapon wear weasel weather weave wedding weed week weigh
weight welcome well west wet whale wheat wheel whisper whistle white whole wide widow width wife
wild will willow wind window wing winner winter wipe wire wisdom wise wish wolf woman wonder
wonderful wood wooden wool word work worker world worm worry worth wound wrap wreck wrist write
writer wrong yard year yellow yesterday young youth zebra zero zoo
"""
