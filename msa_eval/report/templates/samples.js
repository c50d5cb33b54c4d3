"use strict";
(() => {
  const data = JSON.parse(document.getElementById("samples-data").textContent);
  const root = document.getElementById("samples-table");
  const NAMES = { defense: "defence", fc: "FC head" };
  const many = data.results.length > 1;
  const own = (key, result) => (many ? `${key}-${result + 1}` : key);
  const titled = (title, result) => (many ? `${title}, ${data.results[result]}` : title);
  const COLUMNS = [["target", "Target"], ["context", "Context"], ...data.columns.seat];
  const shared = COLUMNS.length;
  data.results.forEach((_, i) => COLUMNS.push(...data.columns.each.map(([key, title]) => [own(key, i), title])));
  const isText = (key) => /^(target|context|fate|by)(-|$)/.test(key);
  const READ = { fate: (value) => data.fates[value], by: (value) => (value < 0 ? null : data.names[value]) };
  const PAGE = 50;
  const rows = [];
  for (const part of data.parts) {
    for (let i = 0; i < part.each[0].fate.length; i++) {
      const at = part.place ? part.place[i] : i;
      const row = { target: NAMES[part.target] || part.target, context: part.context };
      for (const [key] of data.columns.seat) row[key] = data[key][at];
      part.each.forEach((columns, result) => {
        for (const key of Object.keys(columns)) row[own(key, result)] = (READ[key] || ((value) => value))(columns[key][i]);
      });
      row.only = row.runs === 1;
      row.differ = new Set(part.each.map((columns) => columns.fate[i])).size > 1;
      rows.push(row);
    }
  }
  const state = { sort: null, down: false, page: 0, filters: {} };
  const element = (tag, text, attributes) => {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = String(text);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    return made;
  };
  const matches = (row) => Object.entries(state.filters).every(([key, wanted]) => {
    if (wanted === "") return true;
    return String(row[key]) === wanted;
  });
  const compare = (a, b) => {
    const x = a[state.sort], y = b[state.sort];
    if (x === y) return 0;
    if (x === null) return 1; // what is missing comes last, whichever way
    if (y === null) return -1;
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  const controls = element("div", null, { class: "controls" });
  const refilter = (key, value) => { state.filters[key] = value; state.page = 0; show(); };
  const choice = (key, title) => {
    const label = element("label", title);
    const select = element("select", null, { "data-filter": key });
    select.append(element("option", "all", { value: "" }));
    const values = [...new Set(rows.map((row) => row[key]).filter((value) => value !== null))];
    values.sort((x, y) => (x < y ? -1 : x > y ? 1 : 0));
    for (const value of values) select.append(element("option", value, { value: String(value) }));
    select.addEventListener("change", () => refilter(key, select.value));
    label.append(select);
    controls.append(label);
  };
  for (const [key, title] of COLUMNS.slice(0, shared)) if (["target", "context", "label"].includes(key)) choice(key, title);
  data.results.forEach((_, i) => {
    choice(own("fate", i), titled("Fate", i));
    choice(own("by", i), titled("Broken first by", i));
  });
  const searched = element("label", "Sample");
  const search = element("input", null, { type: "text", inputmode: "numeric", "data-filter": "index" });
  search.addEventListener("input", () => refilter("index", search.value.trim()));
  searched.append(search);
  const single = element("label", many ? "Differ only" : "Broken by one run alone");
  const key = many ? "differ" : "only";
  const only = element("input", null, { type: "checkbox", "data-filter": key });
  only.addEventListener("change", () => refilter(key, only.checked ? "true" : ""));
  single.append(only);
  controls.append(searched, single);
  const scroll = element("div", null, { class: "scroll", tabindex: "0", role: "region", "aria-label": "Samples" });
  const table = element("table", null, many ? { class: "paired" } : {});
  const head = element("tr");
  for (const [key, title] of COLUMNS) {
    const cell = element("th", null, { scope: "col", "data-key": key, class: isText(key) ? "text" : "" });
    const button = element("button", title, { type: "button" });
    button.addEventListener("click", () => {
      state.down = state.sort === key && !state.down;
      state.sort = key;
      state.page = 0;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      show();
    });
    cell.append(button);
    head.append(cell);
  }
  const thead = element("thead");
  if (many) {
    const groups = element("tr");
    groups.append(element("td", null, { colspan: shared }));
    for (const name of data.results) groups.append(element("th", name, { scope: "colgroup", class: "group", colspan: data.columns.each.length }));
    thead.append(groups);
  }
  thead.append(head);
  const body = element("tbody");
  table.append(thead, body);
  scroll.append(table);
  const pager = element("div", null, { class: "controls" });
  const back = element("button", "Previous", { type: "button" });
  const forward = element("button", "Next", { type: "button" });
  const sentence = element("span", null, { role: "status" });
  back.addEventListener("click", () => { state.page -= 1; show(); });
  forward.addEventListener("click", () => { state.page += 1; show(); });
  pager.append(back, sentence, forward);
  const show = () => {
    const found = rows.filter(matches);
    if (state.sort) found.sort(compare);
    const first = state.page * PAGE;
    const shown = found.slice(first, first + PAGE);
    body.replaceChildren(...shown.map((row) => {
      const line = element("tr");
      for (const [key] of COLUMNS) line.append(element("td", row[key] === null ? "\u2013" : row[key], { class: isText(key) ? "text" : "" }));
      return line;
    }));
    sentence.textContent = found.length ? `${first + 1}\u2013${first + shown.length} of ${found.length} rows` : "no row fits";
    back.disabled = state.page === 0;
    forward.disabled = first + PAGE >= found.length;
  };
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  root.replaceChildren(controls, scroll, pager);
  show();
})();
