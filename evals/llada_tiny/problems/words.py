"""The closed pools that word problems and passages draw from."""

WOMEN = (
    "Ava Mia Zoe Emma Lily Anna Sara Nora Ruth Ella Jane Kate Lucy Rosa Tina Vera Olga Ines Hana Gina Clara Diana "
    "Elena Flora"
).split()
MEN = (
    "Ben Tom Max Leo Sam Dan Jack Adam Carl Eric Finn Gary Hugo Ivan John Kurt Luke Mark Nick Omar Paul Ravi Seth Tony"
).split()
SURNAMES = (
    "Brown Smith Jones Clark Hill Wood Stone Lake Fox Bell Cole Dale Ford Grant Hunt King Lane Moss North Page Reed "
    "Shaw West Young"
).split()

THINGS = (
    "apples pears plums lemons oranges cookies pencils stamps marbles shells coins cards books stickers eggs flowers "
    "balloons buttons beads ribbons candles postcards"
).split()
CONTAINERS = "boxes bags baskets jars trays".split()
GOODS = "pens cups plates hats scarves toys lamps chairs notebooks brushes bottles towels spoons bowls".split()

# (verb, third person, unit, what the whole is called)
ACTIVITIES = [
    ("read", "reads", "pages", "a book of {n} pages"),
    ("walk", "walks", "miles", "a trail of {n} miles"),
    ("paint", "paints", "tiles", "a wall of {n} tiles"),
    ("bake", "bakes", "rolls", "an order of {n} rolls"),
    ("plant", "plants", "trees", "a plan of {n} trees"),
    ("save", "saves", "dollars", "a goal of {n} dollars"),
    ("write", "writes", "lines", "a poem of {n} lines"),
    ("lay", "lays", "bricks", "a path of {n} bricks"),
]

TOWNS = (
    "Orton Selby Marlow Tarnby Velden Corran Hazelby Linton Ashford Benwick Dunmore Elmsted Farley Glenby Harwick "
    "Kelso Norwood Oakham Pelham Redford Stanby Thornby Upton Westby"
).split()
RIVERS = "Aven Brint Calder Dove Esker Falls Gade Humble Irwell Kern Leven Mersey Nidd Orr Perry Rother".split()
FIRM_NAMES = (
    "Blue Green Silver Golden White Red Crystal Royal Corner Harbor Sunset Cedar Summit Valley Central Union Star "
    "Eagle Crown Anchor Lantern Meadow Amber Copper"
).split()
FIRM_KINDS = "Library Museum Bakery Theater Clinic Studio".split()
NOVEL_NAMES = (
    "Lost Silent Hidden Broken Distant Iron Frozen Burning Empty Secret Endless Fallen Stolen Bitter Gentle Hollow "
    "Painted Restless Forgotten Second Crooked Velvet Narrow Patient"
).split()
NOVEL_KINDS = "Gate Island Winter Garden Letter Bridge".split()
INSTRUMENTS = "piano violin flute guitar harp cello trumpet drum clarinet organ viola banjo oboe tuba".split()
PRODUCTS = "cheese glass honey paper silk wine salt pottery carpets bells clocks bread".split()
