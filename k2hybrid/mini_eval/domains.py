"""Everyday tools and the ways people ask for them. Text only; `toolbox` makes declarations and requests of it.

A role is a parameter that many tools share: its kind of value, the names and descriptions it goes by, and how a
value is mentioned after the main request. A domain is a tool: names, descriptions, the roles it needs and those
it may have, and frames that ask for it with a slot for each needed role.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """A kind of parameter; `names` pairs (name, description)."""

    kind: str
    names: tuple[tuple[str, str], ...]
    mentions: tuple[str, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Domain:
    """An everyday tool. `want` is what it gives or does, in two words at most."""

    want: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    needs: tuple[str, ...]
    may: tuple[str, ...]
    frames: tuple[str, ...]


def _role(kind: str, names: str, mentions: str = "", choices: str = "") -> Role:
    """Roles in one line each: `name: description | …`, mentions and choices parted by |."""
    pairs = [part.partition(":") for part in names.split("|")]
    return Role(
        kind,
        tuple((name.strip(), about.strip()) for name, _, about in pairs),
        tuple(m.strip() for m in mentions.split("|") if m.strip()),
        tuple(tuple(c.split()) for c in choices.split("|") if c.strip()),
    )


# fmt: off
ROLES: dict[str, Role] = {
    "place": _role("place", "city: Name of the city | city: The city name | location: The city and state, e.g. San Francisco, CA"
                   " | location: Location to look up | place: Name of the place | town: The town | city: City, e.g. Paris"
                   " | location: The location | address: A place or an address", "in {v} | at {v} | for {v} | near {v}"),
    "from": _role("place", "origin: Where to start | from: Start of the trip | from_city: Departure city | source: The starting point | departure: Place of departure", "from {v}"),
    "to": _role("place", "destination: Where to go | to: End of the trip | to_city: Arrival city | target: The end point | arrival: Place of arrival", "to {v}"),
    "country": _role("place", "country: Name of the country | country: The country | region: The region"),
    "person": _role("person", "name: Name of the person | person: The person | user: User name | username: The user's name"
                    " | contact: Contact name | customer: Customer name | employee: Name of the employee", "for {v} | of {v}"),
    "recipient": _role("person", "recipient: Who receives it | to: The recipient | contact: Contact to send to | name: Name of the recipient", "to {v}"),
    "email": _role("email", "to: Email address of the recipient | email: The email address | recipient: Recipient email address | address: The email address", "to {v}"),
    "subject": _role("phrase", "subject: Subject line of the email | subject: The subject | title: Subject", "with subject {v} | subject {v} | about {v}"),
    "text": _role("phrase", "text: The text | message: The message to send | body: Body of the message | content: Text content | text: Text to use", "saying {v} | with the text {v} | with message {v}"),
    "title": _role("phrase", "title: Title of the entry | title: The title | name: Its name | summary: Short title", "called {v} | titled {v} | named {v}"),
    "query": _role("phrase", "query: Search query | query: What to search for | q: The query | keywords: Words to search | search_term: The search term", "for {v}"),
    "topic": _role("word", "topic: The topic | subject: Topic to look for | keyword: Keyword | category: The category", "on {v} | about {v}"),
    "item": _role("name", "item: Name of the item | product: Product name | product_name: The product | article: The article", "for {v} | of {v}"),
    "symbol": _role("code", "symbol: Stock symbol | ticker: The ticker symbol | symbol: Ticker, e.g. AAPL | stock: The stock", "for {v} | of {v}"),
    "id": _role("code", "id: The id | order_id: Id of the order | ticket_id: The ticket id | number: The number | key: The key | reference: Reference number | account_id: Id of the account", "with id {v} | number {v} | id {v}"),
    "number_id": _role("int", "id: The id | order_id: Order number | user_id: Numeric user id | ticket: Ticket number | account: Account number", "with id {v} | number {v} | id {v}"),
    "path": _role("path", "path: Path of the file | file: The file | file_path: Path to the file | filename: Name of the file", "in {v} | at {v} | from {v}"),
    "folder": _role("word", "folder: The folder | directory: Directory to use | dir: Folder name", "in {v} | in folder {v}"),
    "date": _role("date", "date: Date, YYYY-MM-DD | date: The date | day: The day as YYYY-MM-DD | start_date: First day", "on {v} | for {v} | on the date {v}"),
    "time": _role("time", "time: Time, HH:MM | time: The time | start_time: When it starts, HH:MM | at: Time of day", "at {v} | for {v}"),
    "days": _role("int", "days: Number of days | days: How many days | duration_days: Days", "for {v} days | for the next {v} days | over {v} days"),
    "minutes": _role("int", "minutes: Number of minutes | duration: Duration in minutes | minutes: How many minutes | duration_minutes: Length in minutes", "for {v} minutes | of {v} minutes | lasting {v} minutes"),
    "limit": _role("int", "limit: Maximum number of results | max_results: How many results | count: How many | top_k: Number of results | n: Number of entries", "limit {v} | at most {v} results | only {v} results | {v} results | top {v}"),
    "page": _role("int", "page: Page number | page: Which page", "page {v} | on page {v}"),
    "amount": _role("decimal", "amount: The amount | amount: Amount of money | value: The value | sum: The sum"),
    "percent": _role("int", "level: Level in percent | percent: Percentage | brightness: Brightness from 0 to 100 | volume: The volume", "to {v} percent | at {v} percent"),
    "degrees": _role("decimal", "temperature: Temperature in degrees | degrees: Degrees | target_temperature: Temperature to reach", "to {v} degrees | at {v} degrees"),
    "quantity": _role("int", "quantity: How many | quantity: Number of pieces | count: Number of items | guests: Number of guests | people: Number of people", "quantity {v} | for {v} people | {v} pieces"),
    "first": _role("decimal", "a: First number | x: The first number | left: First operand | num1: First number"),
    "second": _role("decimal", "b: Second number | y: The second number | right: Second operand | num2: Second number"),
    "room": _role("word", "room: The room | room: Name of the room | area: The area | zone: The zone", "in the {v} | for the {v}"),
    "device": _role("name", "device: The device | device: Name of the device | device_name: Device | appliance: The appliance", "on {v} | for {v}"),
    "service": _role("word", "service: Name of the service | service: The service | app: The app | service_name: Service | job: The job", "for {v}"),
    "language": _role("word", "language: The language | target_language: Language to translate to | lang: Target language | to: Target language", "into {v} | to {v}"),
    "song": _role("phrase", "song: The song | track: Track title | title: Title of the song | song: Name of the song"),
    "artist": _role("person", "artist: The artist | by: Name of the artist | singer: The singer", "by {v}"),
    "genre": _role("word", "genre: The genre | style: Style | type: Type", "genre {v} | of genre {v}"),
    "table": _role("word", "table: The table | table_name: Name of the table | collection: The collection", "from {v} | in table {v} | in {v}"),
    "unit": _role("enum", "unit: Temperature unit | units: Units to use | unit: The unit", "in {v} | use {v} | as {v}", "celsius fahrenheit | metric imperial | celsius fahrenheit kelvin"),
    "from_code": _role("enum", "from_currency: Currency to convert from | from: Source currency | base: Base currency", "", "USD EUR GBP JPY | EUR USD CHF | USD CAD AUD INR"),
    "to_code": _role("enum", "to_currency: Currency to convert to | to: Target currency | target: Target currency", "", "USD EUR GBP JPY | EUR USD CHF | USD CAD AUD INR"),
    "priority": _role("enum", "priority: Priority | priority: How urgent it is | severity: The severity | importance: Importance", "with priority {v} | priority {v} | {v} priority", "low medium high | low normal high urgent | minor major critical"),
    "state": _role("enum", "state: The state | status: New status | status: Status | mode: The mode", "status {v} | {v}", "on off | open closed pending | active inactive | draft published"),
    "order": _role("enum", "sort: Sort order | sort_by: Sort by this | order: The order", "sorted by {v} | sort by {v} | ordered by {v}", "date name size | price rating | asc desc | relevance newest"),
    "format": _role("enum", "format: Output format | format: The format | output: Output type", "as {v} | in {v} format | format {v}", "json csv xml | pdf html | short long | text markdown"),
    "travel": _role("enum", "mode: Means of travel | mode: Travel mode | transport: Transport to use", "by {v} | mode {v}", "car bike walk | driving walking transit | train bus plane"),
    "class": _role("enum", "class: Travel class | seat_class: Class of the seat | cabin: The cabin", "in {v} class | {v} class", "economy business first | standard premium"),
    "size": _role("enum", "size: The size | size: Size of it", "size {v} | in {v}", "small medium large | S M L XL"),
    "color": _role("enum", "color: The color | color: Colour to set", "in {v} | color {v}", "red green blue white | black white | warm cold"),
    "verbose": _role("bool", "verbose: Whether to give details | verbose: More output | details: Include details | debug: Debug output"),
    "urgent": _role("bool", "urgent: Whether it is urgent | important: Mark as important | notify: Notify the people | silent: No sound | repeat: Repeat it | force: Do it even if it exists"),
    "recursive": _role("bool", "recursive: Include subfolders | hidden: Include hidden files | exact: Exact matches only | dry_run: Only show what would happen | include_archived: Include archived entries"),
    "tags": _role("words", "tags: Tags | tags: The tags to set | labels: Labels | keywords: Keywords", "tags {v} | with tags {v} | tagged {v} | labels {v}"),
    "people": _role("words", "attendees: Who attends | participants: The participants | members: The members | guests: Names of the guests | cc: Who gets a copy", "with {v} | together with {v} | invite {v}"),
    "things": _role("words", "items: The items | items: List of items | products: The products | ingredients: The ingredients | files: The files | columns: The columns | names: The names", "items {v} | namely {v} | with {v}"),
    "numbers": _role("ints", "numbers: The numbers | values: List of values | data: The data | ids: The ids | scores: The scores"),
    "address": _role("object", "address: The address | shipping_address: Where to send it | location: The location | contact: Contact data | filter: Conditions | options: Options | settings: Settings | range: The range | customer: The customer"),
}

DOMAINS: tuple[Domain, ...] = (
    Domain("weather", ("get_weather", "get_current_weather", "weather", "fetch_weather", "getWeather", "weather.get", "check_weather", "weather_lookup"),
           ("Get the current weather for a city.", "Retrieve current weather information. Call this when the user asks about the weather.", "Get the weather in a given location", "Returns the weather.", "Look up the weather.", "Current weather conditions."),
           ("place",), ("unit", "days", "date", "verbose"),
           ("What's the weather like in {place} today?", "What's the weather in {place}?", "How is the weather in {place}?", "weather in {place}", "Tell me the weather in {place}.", "Is it raining in {place}?", "Do I need an umbrella in {place}?", "What is the weather like in {place} right now?", "Check the weather for {place}.", "I am going to {place}. How is the weather there?", "Is it sunny in {place}?", "Give me the weather for {place}, please.", "What's it like outside in {place}?", "{place} weather?", "Will it rain in {place}?")),
    Domain("forecast", ("get_forecast", "weather_forecast", "forecast", "getForecast", "fetch_forecast"),
           ("Get the weather forecast for the next days.", "Forecast for a place.", "Returns the forecast.", "Get the forecast of a city"),
           ("place",), ("days", "unit", "format"),
           ("What is the forecast for {place}?", "Give me the forecast for {place}.", "forecast {place}", "How will the weather be in {place} this week?", "Show the weather forecast of {place}.", "I'd like the forecast for {place}.")),
    Domain("time", ("get_time", "get_current_time", "current_time", "clock", "getTime", "time_in"),
           ("Get the current time in a city.", "Returns the local time.", "Current time of a place", "Tell the time in a timezone."),
           ("place",), ("format",),
           ("What time is it in {place}?", "what's the time in {place}", "Tell me the local time in {place}.", "current time in {place}?", "How late is it in {place}?", "I need the time in {place}.", "What is the current time in {place} now?")),
    Domain("population", ("get_population", "population", "city_population"), ("Get the population of a city.", "How many people live in a place.", "Returns the population."),
           ("place",), ("date",), ("How many people live in {place}?", "What is the population of {place}?", "population of {place}", "Tell me how many inhabitants {place} has.", "How big is the population of {place}?", "What's {place}'s population?")),
    Domain("capital", ("get_capital", "capital_of", "find_capital"), ("Get the capital of a country.", "Returns the capital city.", "Look up the capital."),
           ("country",), (), ("What is the capital of {country}?", "capital of {country}?", "Which city is the capital of {country}?", "Tell me the capital of {country}.", "Find the capital of {country}.", "What's {country}'s capital?")),
    Domain("stock price", ("get_stock_price", "stock_price", "getStockPrice", "stocks.price", "quote"),
           ("Get the current price of a stock.", "Returns the stock price for a symbol.", "Retrieve a stock quote.", "Look up a share price by ticker"),
           ("symbol",), ("date", "format", "from_code"),
           ("What is the stock price of {symbol}?", "How much is {symbol} stock?", "Get the price of {symbol} shares.", "stock price {symbol}", "What's {symbol} trading at?", "Show me the quote for {symbol}.", "Check the share price of {symbol}.", "Where is {symbol} today?")),
    Domain("conversion", ("convert_currency", "currency_convert", "exchange", "convertCurrency", "currency.convert"),
           ("Convert an amount from one currency to another.", "Currency conversion.", "Converts money between currencies."),
           ("amount", "from_code", "to_code"), ("date",),
           ("Convert {amount} {from_code} to {to_code}.", "How much is {amount} {from_code} in {to_code}?", "What is {amount} {from_code} in {to_code}?", "{amount} {from_code} to {to_code}", "I have {amount} {from_code}, how many {to_code} is that?", "Please change {amount} {from_code} into {to_code}.", "Exchange {amount} {from_code} for {to_code}.")),
    Domain("email", ("send_email", "email", "sendEmail", "mail.send", "send-email", "compose_email"),
           ("Send an email to a recipient.", "Sends an email.", "Compose and send an email", "Email someone."),
           ("email", "subject"), ("text", "urgent", "people", "priority"),
           ("Send an email to {email} with the subject {subject}.", "Email {email} with subject {subject}.", "Write an email to {email}, subject {subject}.", "send mail to {email}, subject: {subject}", "Please email {email}. The subject is {subject}.", "I want to send {email} an email with the subject {subject}.", "Can you write to {email} with subject {subject}?", "Shoot an email to {email} titled {subject}.")),
    Domain("message", ("send_message", "message", "sendMessage", "chat.send", "text_contact", "send_sms"),
           ("Send a message to a contact.", "Sends a text message.", "Message someone.", "Send a chat message"),
           ("recipient", "text"), ("urgent", "priority"),
           ("Send a message to {recipient} saying {text}.", "Text {recipient} {text}.", "Tell {recipient} {text}.", "message {recipient}: {text}", "Please let {recipient} know {text}.", "Write {recipient} a message: {text}.", "Can you message {recipient} and say {text}?", "Send {text} to {recipient}.")),
    Domain("event", ("create_event", "add_event", "createEvent", "calendar.create", "schedule_meeting", "create_calendar_event"),
           ("Create a calendar event.", "Add an event to the calendar.", "Schedule a meeting.", "Creates a new appointment."),
           ("title", "date"), ("time", "people", "place", "minutes", "tags", "urgent"),
           ("Create an event called {title} on {date}.", "Schedule {title} for {date}.", "Add {title} to my calendar on {date}.", "Put {title} on {date} in the calendar.", "set up a meeting {title} on {date}", "I have {title} on {date}, please add it.", "Plan a meeting named {title} on {date}.", "Book {title} on {date} in my calendar.")),
    Domain("reminder", ("set_reminder", "create_reminder", "remind_me", "addReminder", "reminders.add"),
           ("Set a reminder.", "Create a reminder for later.", "Reminds the user of something."),
           ("text", "time"), ("date", "priority", "urgent"),
           ("Remind me at {time} about {text}.", "Set a reminder for {text} at {time}.", "reminder {text} at {time}", "Please remind me of {text} at {time}.", "At {time}, remind me: {text}.", "I need a reminder for {text} at {time}.", "Don't let me forget {text} at {time}.")),
    Domain("timer", ("set_timer", "start_timer", "timer", "startTimer", "create_timer"), ("Start a timer.", "Set a countdown timer in minutes.", "Starts a kitchen timer."),
           ("minutes",), ("title", "urgent"), ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.", "timer {minutes} minutes", "Wake me in {minutes} minutes.", "Count down {minutes} minutes.", "Can you time {minutes} minutes?")),
    Domain("alarm", ("set_alarm", "create_alarm", "alarm", "setAlarm"), ("Set an alarm.", "Create an alarm clock entry.", "Alarm at a time of day."),
           ("time",), ("title", "urgent", "date"), ("Set an alarm for {time}.", "Wake me up at {time}.", "alarm at {time}", "I want an alarm at {time}.", "Please wake me at {time}.", "Can you set the alarm to {time}?")),
    Domain("lights", ("set_lights", "control_light", "light", "setLights", "home.lights", "turn_light"), ("Control the lights in a room.", "Switch or dim lights.", "Set the light of a room."),
           ("room", "percent"), ("color",), ("Set the {room} lights to {percent} percent.", "Dim the lights in the {room} to {percent} percent.", "Lights in the {room} at {percent}%", "Make the {room} light {percent} percent bright.", "Turn the {room} lights to {percent}%.", "I want the light in the {room} at {percent} percent.")),
    Domain("thermostat", ("set_thermostat", "set_temperature", "thermostat", "setTemperature", "heating.set"), ("Set the temperature of a room.", "Control the thermostat.", "Set the heating."),
           ("degrees",), ("room", "unit"), ("Set the thermostat to {degrees} degrees.", "Make it {degrees} degrees in here.", "Heat to {degrees} degrees.", "thermostat {degrees}", "Please set the temperature to {degrees}.", "Can you turn the heating to {degrees} degrees?")),
    Domain("device", ("switch_device", "turn_on", "control_device", "setDevice", "device.switch", "toggle"), ("Switch a device.", "Control a smart device.", "Turn a device on or off."),
           ("device", "state"), ("room",), ("Turn the {device} {state}.", "Switch {device} {state}.", "{device} {state} please", "Please set {device} to {state}.", "I want the {device} {state}.", "Could you make {device} {state}?")),
    Domain("song", ("play_song", "play_music", "music.play", "playMusic", "play"), ("Play a song.", "Play music.", "Plays a track."),
           ("song",), ("artist", "device", "percent", "urgent"), ("Play {song}.", "Play the song {song}.", "I want to hear {song}.", "put on {song}", "Can you play {song} for me?", "Please start the track {song}.", "Let me listen to {song}.")),
    Domain("search", ("search_web", "web_search", "search", "searchWeb", "google", "web.search", "search-web"), ("Search the web.", "Search the internet for information.", "Find web pages for a query.", "Runs a web search."),
           ("query",), ("limit", "page", "language", "order", "verbose"),
           ("Search the web for {query}.", "Search for {query}.", "Look up {query} on the web.", "google {query}", "Find pages about {query}.", "Can you search {query}?", "I want to find {query} on the internet.", "What does the web say about {query}?")),
    Domain("news", ("get_news", "news", "fetch_news", "latest_news", "getNews"), ("Get the latest news on a topic.", "Fetch news articles.", "Returns news headlines."),
           ("topic",), ("limit", "language", "date", "order"), ("What's the news on {topic}?", "Get me the latest news about {topic}.", "news about {topic}", "Show news on {topic}.", "Any headlines about {topic}?", "What's new in {topic}?", "Read me the news on {topic}.")),
    Domain("file", ("read_file", "readFile", "fs.read", "open_file", "cat", "read-file"), ("Read a file.", "Returns the content of a file.", "Read the file at a path.", "Opens a file and reads it"),
           ("path",), ("limit", "format", "verbose"), ("Read {path}.", "Show me the file {path}.", "What's in {path}?", "open {path}", "Print the content of {path}.", "Can you read the file {path}?", "Let me see {path}.", "cat {path}")),
    Domain("file", ("write_file", "writeFile", "fs.write", "save_file", "create_file"), ("Write text to a file.", "Saves content to a file.", "Create a file with content."),
           ("path", "text"), ("urgent", "format"), ("Write {text} to {path}.", "Save {text} in {path}.", "Create {path} with the content {text}.", "Put {text} into the file {path}.", "Store {text} as {path}.", "make a file {path} containing {text}", "Please write the text {text} to the file {path}.")),
    Domain("files", ("list_files", "listFiles", "fs.list", "ls", "list_directory"), ("List the files of a folder.", "Lists a directory.", "Show files in a directory."),
           ("folder",), ("recursive", "order", "limit"), ("List the files in {folder}.", "What files are in {folder}?", "ls {folder}", "Show the folder {folder}.", "Which files does {folder} have?", "Show me everything in {folder}.", "List folder {folder}.")),
    Domain("rows", ("query_database", "run_query", "select_rows", "db.query", "queryTable"), ("Query a database table.", "Select rows from a table.", "Get rows of a table."),
           ("table",), ("limit", "things", "order", "address"), ("Get rows from the table {table}.", "Query the {table} table.", "Show the {table} table.", "select from {table}", "Give me the rows of {table}.", "What is in the {table} table?")),
    Domain("translation", ("translate", "translate_text", "translateText", "language.translate"), ("Translate text into another language.", "Translates a text.", "Translation of a text."),
           ("text", "language"), ("format",), ("Translate {text} into {language}.", "Translate {text} to {language}.", "How do you say {text} in {language}?", "What is {text} in {language}?", "Please translate the text {text} into {language}.", "{text} in {language}?", "I need {text} translated to {language}.")),
    Domain("route", ("get_directions", "directions", "find_route", "getRoute", "maps.route", "plan_route"), ("Get directions between two places.", "Find a route.", "Plans a route from one place to another."),
           ("from", "to"), ("travel", "time", "date"), ("How do I get from {from} to {to}?", "Directions from {from} to {to}.", "Find a route from {from} to {to}.", "What's the way from {from} to {to}?", "Navigate from {from} to {to}.", "route {from} to {to}", "I need to go from {from} to {to}.", "Show me how to get to {to} from {from}.")),
    Domain("distance", ("get_distance", "distance", "calculate_distance"), ("Get the distance between two places.", "Distance in kilometers.", "Calculates how far apart two places are."),
           ("from", "to"), ("unit", "travel"), ("How far is it from {from} to {to}?", "What is the distance between {from} and {to}?", "distance {from} {to}", "How far is {to} from {from}?", "Tell me the distance from {from} to {to}.", "Compute the distance between {from} and {to}.")),
    Domain("flights", ("search_flights", "find_flights", "book_flight", "searchFlights", "flights.search"), ("Search for flights.", "Find flights between two cities.", "Book a flight."),
           ("from", "to", "date"), ("class", "quantity", "order"), ("Find flights from {from} to {to} on {date}.", "I want to fly from {from} to {to} on {date}.", "Book a flight from {from} to {to} on {date}.", "flights {from} to {to} {date}", "Are there flights from {from} to {to} on {date}?", "Get me from {from} to {to} by plane on {date}.", "Search a flight to {to} from {from} for {date}.")),
    Domain("hotel", ("book_hotel", "find_hotels", "search_hotels", "bookHotel", "hotels.search"), ("Find hotels in a city.", "Book a hotel room.", "Search for hotels."),
           ("place",), ("date", "days", "quantity", "order", "limit"), ("Find a hotel in {place}.", "Book a hotel in {place}.", "hotels in {place}", "I need a room in {place}.", "Search hotels in {place}.", "Where can I stay in {place}?", "Look for a hotel in {place}.")),
    Domain("restaurants", ("find_restaurants", "search_restaurants", "restaurants", "book_table", "findRestaurants"), ("Find restaurants in a place.", "Search for restaurants.", "Reserve a table."),
           ("place",), ("genre", "quantity", "time", "limit", "date"), ("Find a restaurant in {place}.", "Where can I eat in {place}?", "restaurants in {place}", "Show me restaurants in {place}.", "I want to eat in {place}.", "Look for places to eat in {place}.", "Suggest a restaurant in {place}.")),
    Domain("order", ("get_order", "order_status", "track_order", "getOrderStatus", "orders.get", "check_order"), ("Get the status of an order.", "Track an order.", "Look up an order by id."),
           ("id",), ("verbose", "format"), ("Where is my order {id}?", "What's the status of order {id}?", "Track order {id}.", "order {id} status", "Check my order {id}, please.", "Has order {id} shipped?", "I want to know where {id} is.")),
    Domain("order", ("cancel_order", "cancelOrder", "orders.cancel"), ("Cancel an order.", "Cancels an order by number.", "Stop an order."),
           ("number_id",), ("text", "urgent"), ("Cancel order {number_id}.", "Please cancel my order {number_id}.", "I don't want order {number_id} any more.", "cancel {number_id}", "Can you stop order {number_id}?", "Order {number_id} should be cancelled.")),
    Domain("order", ("place_order", "buy_product", "create_order", "shop.buy", "order_item"), ("Order a product.", "Buy an item.", "Places an order."),
           ("item", "quantity"), ("size", "color", "address", "urgent"), ("Order {quantity} of {item}.", "Buy {quantity} {item}.", "I'd like {quantity} pieces of {item}.", "order {quantity} x {item}", "Please get me {quantity} {item}.", "Purchase {quantity} units of {item}.")),
    Domain("products", ("search_products", "find_products", "searchProducts", "catalog.search"), ("Search the product catalog.", "Find products in the shop.", "Product search."),
           ("query",), ("limit", "order", "size", "color", "amount"), ("Find products for {query}.", "Search the shop for {query}.", "Do you have {query} in the shop?", "Show me products like {query}.", "products {query}", "I want to buy {query}. What products are there?")),
    Domain("user", ("get_user", "find_user", "lookup_user", "getUser", "users.get", "user_info"), ("Get information about a user.", "Look up a user.", "Returns a user's profile."),
           ("person",), ("verbose", "format"), ("Who is {person}?", "Get the user {person}.", "Look up {person}.", "Show me the profile of {person}.", "user {person}", "Find the user named {person}.", "What do we know about {person}?")),
    Domain("user", ("create_user", "add_user", "createUser", "users.create", "register_user"), ("Create a new user.", "Add a user account.", "Registers a user."),
           ("person", "email"), ("state", "tags", "address", "urgent"), ("Create a user {person} with email {email}.", "Add {person}, email {email}, as a user.", "Register {person} ({email}).", "new user {person} {email}", "Please create an account for {person} with {email}.", "Make a user account for {person}, email {email}.")),
    Domain("balance", ("get_balance", "check_balance", "account_balance", "getBalance", "bank.balance"), ("Get the balance of an account.", "Check an account balance.", "Returns how much money is in an account."),
           ("id",), ("date", "from_code"), ("What's the balance of account {id}?", "How much money is in {id}?", "balance {id}", "Check the balance of {id}.", "Show me the account balance for {id}.", "Tell me how much is on account {id}.")),
    Domain("transfer", ("transfer_money", "send_money", "transferMoney", "bank.transfer", "make_payment"), ("Transfer money to somebody.", "Send money.", "Makes a payment."),
           ("amount", "recipient"), ("from_code", "text", "date", "urgent"), ("Transfer {amount} to {recipient}.", "Send {recipient} {amount}.", "Pay {recipient} {amount}.", "transfer {amount} to {recipient}", "Please send {amount} to {recipient}.", "I owe {recipient} {amount}, pay it.")),
    Domain("ticket", ("create_ticket", "open_ticket", "createTicket", "create_issue", "issues.create", "report_bug"), ("Create a support ticket.", "Open an issue.", "Files a bug report."),
           ("title",), ("priority", "tags", "person", "text"), ("Create a ticket called {title}.", "Open a ticket: {title}.", "File an issue titled {title}.", "new ticket {title}", "Please report a bug named {title}.", "I want to open an issue {title}.")),
    Domain("ticket", ("update_ticket", "set_ticket_status", "updateTicket", "tickets.update"), ("Update the status of a ticket.", "Change a ticket.", "Sets a ticket's status."),
           ("number_id", "state"), ("text", "priority"), ("Set ticket {number_id} to {state}.", "Mark ticket {number_id} as {state}.", "ticket {number_id} {state}", "Please change ticket {number_id} to {state}.", "Ticket {number_id} is now {state}.", "Update {number_id}: {state}.")),
    Domain("note", ("create_note", "add_note", "take_note", "createNote", "notes.add"), ("Create a note.", "Save a note.", "Writes down a note."),
           ("text",), ("title", "tags", "folder"), ("Take a note: {text}.", "Note down {text}.", "Write down {text}.", "note {text}", "Make a note that says {text}.", "Please save the note {text}.", "Remember this: {text}.")),
    Domain("task", ("add_task", "create_task", "add_todo", "addTask", "todo.add"), ("Add a task to the list.", "Create a to-do entry.", "Adds a todo."),
           ("title",), ("date", "priority", "tags", "person"), ("Add {title} to my to-do list.", "New task: {title}.", "Create a task {title}.", "todo {title}", "Put {title} on the task list.", "I have to do {title}, add it to my tasks.")),
    Domain("list", ("add_to_list", "add_items", "update_list", "shopping_list_add", "list.add"), ("Add items to a list.", "Add things to the shopping list.", "Puts items on a list."),
           ("things",), ("title", "urgent"), ("Add {things} to the list.", "Put {things} on the shopping list.", "We need {things}.", "list: {things}", "Please add {things}.", "Can you put {things} on my list?")),
    Domain("sum", ("add_numbers", "add", "sum", "calc.add", "calculate_sum"), ("Add two numbers.", "Returns the sum of two numbers.", "Adds numbers."),
           ("first", "second"), (), ("Add {first} and {second}.", "What is {first} plus {second}?", "{first} + {second}", "Compute the sum of {first} and {second}.", "How much is {first} plus {second}?", "Sum up {first} and {second}.")),
    Domain("product", ("multiply", "multiply_numbers", "mul", "calc.multiply"), ("Multiply two numbers.", "Returns the product.", "Multiplies a and b."),
           ("first", "second"), (), ("Multiply {first} by {second}.", "What is {first} times {second}?", "{first} * {second}", "{first} x {second} = ?", "Compute {first} times {second}.", "Work out the product of {first} and {second}.")),
    Domain("average", ("calculate_average", "average", "mean", "stats.mean", "compute_statistics"), ("Compute the average of numbers.", "Mean of a list of numbers.", "Statistics of a list."),
           ("numbers",), ("verbose",), ("What is the average of {numbers}?", "Compute the mean of {numbers}.", "average {numbers}", "Average these: {numbers}.", "Calculate the average for {numbers}.", "Give me the mean value of {numbers}.")),
    Domain("service", ("restart_service", "restart", "restartService", "ops.restart", "start_service", "stop_service"), ("Restart a service.", "Controls a service.", "Restarts a running service."),
           ("service",), ("recursive", "urgent", "minutes"), ("Restart {service}.", "Restart the service {service}.", "restart {service} please", "The {service} service hangs, restart it.", "Can you bounce {service}?", "Please restart the {service} service.")),
    Domain("deployment", ("deploy", "deploy_app", "deployService", "ci.deploy", "release"), ("Deploy an application.", "Deploys a service to an environment.", "Roll out a version."),
           ("service",), ("id", "state", "recursive", "tags"), ("Deploy {service}.", "Deploy the app {service}.", "Roll out {service}.", "ship {service}", "Please release {service}.", "I want {service} deployed.")),
    Domain("logs", ("get_logs", "read_logs", "logs", "fetchLogs", "ops.logs"), ("Get the logs of a service.", "Show log lines.", "Returns recent logs."),
           ("service",), ("limit", "date", "priority", "verbose"), ("Show the logs of {service}.", "Get logs for {service}.", "logs {service}", "What do the {service} logs say?", "Let me see the log of {service}.", "Fetch the logs from {service}.")),
    Domain("address", ("update_address", "change_address", "setAddress", "customer.address"), ("Update an address.", "Change where a customer lives.", "Set the shipping address."),
           ("person", "address"), ("urgent",), ("Change the data of {person}: {address}.", "Update {person} with {address}.", "For {person}, set {address}.", "{person} has new data: {address}.", "Please save {address} for {person}.", "Set {address} for {person}.")),
    Domain("recipe", ("find_recipe", "get_recipe", "recipes.search", "search_recipes"), ("Find a recipe.", "Search recipes by ingredients.", "Look for something to cook."),
           ("things",), ("minutes", "quantity", "limit"), ("Find a recipe with {things}.", "What can I cook with {things}?", "recipe {things}", "I have {things}. What can I make?", "Give me a recipe that uses {things}.", "Look for recipes with {things}.")),
    Domain("definition", ("define_word", "get_definition", "dictionary", "defineWord", "lookup_word"), ("Get the definition of a word.", "Look up a word in the dictionary.", "Defines a word."),
           ("topic",), ("language",), ("What does {topic} mean?", "Define {topic}.", "definition of {topic}", "Look up the word {topic}.", "What's the meaning of {topic}?", "Explain the word {topic}.")),
    Domain("price", ("get_price", "product_price", "price", "getPrice", "shop.price"), ("Get the price of a product.", "How much an item costs.", "Returns the price."),
           ("item",), ("from_code", "quantity"), ("How much is {item}?", "What does {item} cost?", "price of {item}", "What's the price of {item}?", "Tell me what {item} costs.", "Check the price for {item}.")),
    Domain("stock", ("check_stock", "get_inventory", "inventory", "checkStock", "warehouse.stock"), ("Check how many of a product are left.", "Inventory of an item.", "Is the product in stock."),
           ("item",), ("place", "size", "color"), ("Is {item} in stock?", "How many {item} are left?", "stock of {item}", "Check the inventory for {item}.", "Do we still have {item}?", "Are there any {item} left?")),
)
# fmt: on
