// Elements made by hand: text is only ever text, never HTML.

export const at = (id) => document.getElementById(id);

/** An element with properties (`class` among them) and children, which are nodes or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Show text in a place that is hidden while it has none. */
export function tell(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

const HUES = [38, 250, 150, 310, 195, 85, 350, 280];
const given = new Map();

/** Give an element the colour of a name, the same on the whole page; "" is the base model's grey. */
export function paint(element, name, property = "--hue") {
  if (name && !given.has(name)) given.set(name, HUES[given.size % HUES.length]);
  if (name) element.style.setProperty(property, given.get(name));
  else element.style.removeProperty(property);
}

export const short = (version) => version.slice(0, 7);
