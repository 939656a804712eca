// Two rows of a table are chosen, by a click or by the keyboard; below it stands what they differ in.
const table = document.querySelector(".choose table")
const difference = document.getElementById("difference")
const chosen = []

function cell(kind, words) {
  const made = document.createElement(kind)
  made.textContent = words
  return made
}

function change(from, to) {
  const [a, b] = [from, to].map(one => one.querySelector("data"))
  if (!a || !b) return ""
  const by = b.value - a.value
  const share = Number(a.value) ? ` (${(100 * by / a.value).toFixed(1)} %)` : ""
  return `${by > 0 ? "+" : ""}${Number(by.toPrecision(3)).toLocaleString("en")}${share}`
}

function show() {
  difference.querySelector("table")?.remove()
  if (chosen.length < 2) return
  const [first, second] = chosen
  const shown = document.createElement("table")
  for (const [i, title] of [...table.tHead.rows[0].cells].entries()) {
    const [a, b] = [first.cells[i], second.cells[i]]
    if (i && a.innerText === b.innerText) continue
    const by = i ? change(a, b) : "Second less first"
    shown.insertRow().append(cell("th", title.textContent), ...[a.innerText, b.innerText, by].map(words => cell("td", words)))
  }
  difference.append(shown)
}

for (const row of table.tBodies[0].rows) {
  const box = document.createElement("input")
  box.type = "checkbox"
  box.setAttribute("aria-label", `compare ${row.innerText.replaceAll("\t", ", ")}`)
  row.cells[0].prepend(box, " ")
  row.addEventListener("click", event => {
    if (event.target !== box) box.checked = !box.checked
    if (box.checked) chosen.push(row)
    else chosen.splice(chosen.indexOf(row), 1)
    if (chosen.length > 2) chosen.shift().querySelector("input").checked = false
    show()
  })
}
difference.hidden = false
