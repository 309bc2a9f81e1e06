"""A closed body of common facts for the four-choice questions."""

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COUNTING = "one two three four five six seven eight nine ten eleven twelve".split()


def _pairs(text: str) -> list[tuple[str, str]]:
    """'a:b, c d:e f' as [(a, b), (c d, e f)]."""
    return [tuple(part.strip() for part in pair.split(":")) for pair in text.split(",")]


# relation -> (question forms, the sentence that states the fact, pairs of subject and object)
RELATIONS: dict[str, tuple[tuple[str, ...], str, list[tuple[str, str]]]] = {
    "capital": (
        ("What is the capital of {s}?", "Which city is the capital of {s}?", "{s} has which capital?"),
        "The capital of {s} is {o}.",
        _pairs(
            "France:Paris, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Greece:Athens, Austria:Vienna, Poland:Warsaw,"
            "Norway:Oslo, Sweden:Stockholm, Denmark:Copenhagen, Finland:Helsinki, Germany:Berlin, Hungary:Budapest,"
            "Ireland:Dublin, Russia:Moscow, Japan:Tokyo, China:Beijing, India:New Delhi, Egypt:Cairo, Kenya:Nairobi,"
            "Canada:Ottawa, Cuba:Havana, Peru:Lima, Chile:Santiago, Argentina:Buenos Aires, Australia:Canberra,"
            "Turkey:Ankara, Iran:Tehran, Iraq:Baghdad, Thailand:Bangkok, Belgium:Brussels, Ukraine:Kyiv"
        ),
    ),
    "opposite": (
        ("What is the opposite of {s}?", "Which word means the opposite of {s}?", "{s} is the opposite of which word?"),
        "The opposite of {s} is {o}.",
        _pairs(
            "hot:cold, big:small, tall:short, fast:slow, hard:soft, light:dark, early:late, full:empty, rich:poor,"
            "open:closed, old:young, high:low, wet:dry, loud:quiet, near:far, happy:sad, strong:weak, thick:thin,"
            "wide:narrow, clean:dirty, deep:shallow, sharp:blunt, true:false, good:bad, first:last, heavy:light"
        ),
    ),
    "young": (
        ("What is a young {s} called?", "Which word names a young {s}?"),
        "A young {s} is called a {o}.",
        _pairs(
            "dog:puppy, cat:kitten, cow:calf, sheep:lamb, horse:foal, goat:kid, pig:piglet, bear:cub, deer:fawn,"
            "duck:duckling, goose:gosling, frog:tadpole, swan:cygnet, kangaroo:joey, hen:chick"
        ),
    ),
    "past": (
        ("What is the past tense of {s}?", "Which word is the past tense of {s}?"),
        "The past tense of {s} is {o}.",
        _pairs(
            "go:went, see:saw, eat:ate, run:ran, take:took, give:gave, write:wrote, speak:spoke, drive:drove,"
            "sing:sang, swim:swam, begin:began, fly:flew, know:knew, grow:grew, draw:drew, buy:bought, think:thought,"
            "bring:brought, teach:taught, find:found, keep:kept, sleep:slept, tell:told, sell:sold, stand:stood"
        ),
    ),
    "plural": (
        ("What is the plural of {s}?", "Which word is the plural of {s}?"),
        "The plural of {s} is {o}.",
        _pairs(
            "man:men, woman:women, child:children, foot:feet, tooth:teeth, mouse:mice, goose:geese, ox:oxen,"
            "leaf:leaves, knife:knives, wolf:wolves, city:cities, baby:babies, box:boxes, bus:buses, person:people"
        ),
    ),
    "work": (
        ("Who usually {s}?", "Which person {s} as a job?"),
        "A {o} {s}.",
        _pairs(
            "bakes bread:baker, teaches pupils:teacher, flies planes:pilot, treats sick people:doctor,"
            "cuts hair:barber, grows crops:farmer, puts out fires:firefighter, fixes pipes:plumber,"
            "builds houses:builder,"
            "paints pictures:painter, cooks meals:cook, sails ships:sailor, catches fish:fisherman,"
            "sews clothes:tailor, repairs teeth:dentist"
        ),
    ),
    "sides": (
        ("Which shape has {s} sides?", "What is a shape with {s} sides called?"),
        "A shape with {s} sides is called a {o}.",
        _pairs("three:triangle, four:square, five:pentagon, six:hexagon, seven:heptagon, eight:octagon, ten:decagon"),
    ),
}

# category -> (article and name, members)
CATEGORIES: dict[str, tuple[str, list[str]]] = {
    name: (phrase, members.split())
    for name, phrase, members in (
        ("fruit", "a fruit", "apple pear plum lemon orange banana grape peach mango cherry melon fig"),
        ("mammal", "a mammal", "dog cat horse cow sheep lion tiger bear wolf rabbit monkey camel"),
        ("bird", "a bird", "eagle owl crow swan parrot penguin sparrow hawk robin pigeon stork gull"),
        ("fish", "a fish", "salmon trout tuna shark cod herring eel carp pike perch sardine haddock"),
        ("tool", "a tool", "hammer saw drill wrench pliers shovel rake axe chisel file screwdriver spade"),
        ("sport", "a sport", "tennis football hockey golf rugby baseball boxing rowing skiing judo karate surfing"),
        ("metal", "a metal", "iron gold silver copper tin lead zinc nickel steel brass aluminum bronze"),
        (
            "instrument",
            "a musical instrument",
            "piano violin flute guitar harp cello trumpet drum clarinet tuba banjo oboe",
        ),
        ("clothing", "a piece of clothing", "shirt coat hat sock glove scarf dress skirt sweater jacket shoe belt"),
        (
            "furniture",
            "a piece of furniture",
            "chair table bed sofa desk shelf bench stool wardrobe cupboard dresser couch",
        ),
        ("vehicle", "a vehicle", "car bus train truck bicycle boat plane tram van taxi ship ferry"),
        ("tree", "a tree", "oak pine birch maple willow elm ash cedar fir spruce poplar beech"),
        ("bodypart", "a part of the body", "arm leg hand foot head nose ear knee elbow shoulder neck finger"),
    )
}
