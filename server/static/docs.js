// Draws /openapi.json. Text goes into the page as text only, never as HTML.
"use strict";

const REF = "#/components/schemas/";

function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function schemaLink(ref) {
  const name = ref.slice(REF.length);
  return element("a", { href: "#schema-" + name }, name);
}

function join(parts, separator) {
  return parts.flatMap((part, index) => (index ? [separator, ...part] : part));
}

// Text whose parts in backticks are code, as a list of nodes and strings.
function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", null, part) : part));
}

// The type of a schema, as a list of nodes and strings.
function typeOf(schema) {
  if (!schema || typeof schema !== "object") return ["any"];
  if (schema.$ref) return [schemaLink(schema.$ref)];
  const choices = schema.anyOf || schema.oneOf;
  if (choices) return join(choices.map(typeOf), " | ");
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" | ")];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  if (Array.isArray(schema.type)) return [schema.type.join(" | ")];
  return [schema.type || "any"];
}

const LIMITS = { minimum: "≥ ", exclusiveMinimum: "> ", maximum: "≤ ", exclusiveMaximum: "< ", minLength: "length ≥ ",
  maxLength: "length ≤ ", minItems: "items ≥ ", maxItems: "items ≤ " };

function rangeOf(schema) {
  const parts = [schema, ...(schema.anyOf || [])];
  return parts.flatMap((part) => Object.keys(LIMITS).filter((key) => key in part).map((key) => LIMITS[key] + part[key]))
    .join(", ");
}

function fieldTable(schema) {
  const body = element("tbody");
  const required = new Set(schema.required || []);
  for (const [name, field] of Object.entries(schema.properties || {})) {
    body.append(element("tr", null,
      element("td", null, element("code", null, name), required.has(name) ? " (required)" : ""),
      element("td", null, ...typeOf(field)),
      element("td", null, [field.description, rangeOf(field)].filter(Boolean).join(" "))));
  }
  const head = element("tr", null, ...["field", "type", "meaning"].map((title) => element("th", null, title)));
  return element("table", null, element("thead", null, head), body);
}

function drawEndpoint(path, method, operation) {
  const id = method + path.replace(/\W+/g, "-");
  const section = element("section", { id },
    element("h2", null, element("span", { class: "method" }, method.toUpperCase()), element("code", null, path)),
    element("p", null, operation.summary + "."));
  const body = operation.requestBody && operation.requestBody.content["application/json"].schema.$ref;
  if (body) section.append(element("p", null, "Body: ", schemaLink(body)));
  const rows = element("tbody");
  for (const [status, response] of Object.entries(operation.responses)) {
    const kinds = Object.entries(response.content || {}).map(([kind, { schema }]) =>
      schema.$ref ? typeOf(schema) : [kind]);
    rows.append(element("tr", null, element("td", null, status), element("td", null, ...prose(response.description)),
      element("td", null, ...join(kinds, " | "))));
  }
  section.append(element("table", null, rows));
  document.getElementById("endpoints").append(section);
  return element("li", null, element("a", { href: "#" + id },
    element("span", { class: "method" }, method.toUpperCase()), path));
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
  if (target) target.scrollIntoView();
}

async function main() {
  const about = document.getElementById("about");
  const reply = await fetch("/openapi.json");
  if (!reply.ok) {
    about.textContent = "The reference could not be loaded: status " + reply.status + ".";
    return;
  }
  const document_ = await reply.json();
  about.textContent = document_.info.description + " Version " + document_.info.version + ".";
  const list = element("ul");
  for (const [path, operations] of Object.entries(document_.paths)) {
    for (const [method, operation] of Object.entries(operations)) list.append(drawEndpoint(path, method, operation));
  }
  document.getElementById("contents").append(list);
  for (const [name, schema] of Object.entries(document_.components.schemas)) {
    document.getElementById("schemas").append(element("details", { id: "schema-" + name },
      element("summary", null, name), element("p", null, schema.description || ""), fieldTable(schema)));
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();
}

main();
